from pathlib import Path

import pytest
import torch

from tests.evaluation.fake import NAMES, ColourModel, square


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def model() -> ColourModel:
    return ColourModel()


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """Twelve images of each of four colours, one folder a class."""
    for name in NAMES:
        folder = tmp_path / "labelled" / name
        folder.mkdir(parents=True)
        for shade in range(12):
            square(name, 3 * shade).save(folder / f"{shade:02d}.png")
    return tmp_path / "labelled"


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Eight images with captions; every caption occurs twice."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    for number in range(8):
        name = NAMES[number % 4]
        square(name, number).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"{name} square")
    return folder

"""Cases of images that are labelled: every file has its row, or is counted in one line."""

import io
import json
import random
import shutil
from pathlib import Path

import pytest
from PIL import Image

from tests.evaluation.test_commands import command, save_random_model

from .small import CLASSIFY, picture, write_files


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_random_model(tmp_path_factory.mktemp("model"), 0)


def classify(model: str, *images: str) -> int:
    return command("classify", model, *images, "--labels", "cat,coffee", "--top-k", 1, "--format", "json")


def test_hidden_folders_and_files_are_no_images(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = shutil.copytree(CLASSIFY / "hidden" / "train", tmp_path / "train")
    for name in (".ipynb_checkpoints", ".thumbnails", "cat/.@__thumb"):
        write_files(train / name, {"0.png": picture(0)})
    assert classify(model, str(train)) == 0
    out, err = capsys.readouterr()
    rows = json.loads(out)
    assert len(rows) == 16 and not any("/." in f"/{row['image']}" for row in rows)
    assert "hidden: 6 images" in err
    assert command("probe", "fit", model, train, tmp_path / "p.safetensors", "--C", 1) == 0
    assert "16 training images, 2 classes" in capsys.readouterr().out


def test_files_of_unknown_formats_are_counted(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(0)
    counts = {"pdf": 3, "mp4": 2, "svg": 1}
    files = {f"{i}.png": picture(i) for i in range(3)}
    files |= {f"{i}.{end}": draw.randbytes(30) for end, count in counts.items() for i in range(count)}
    folder = write_files(tmp_path / "mixed", files)
    assert classify(model, str(folder)) == 0
    assert "left out: 3 × .pdf, 2 × .mp4, 1 × .svg" in capsys.readouterr().err
    assert command("evaluate", model, folder, "--tasks", "retrieval") == 2  # no captions, no labels: said in one line
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("name", ["mixed", "only"])
def test_pictures_that_cannot_be_read_are_counted_in_one_line(
    model: str, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """The .HEIC and .avif files of the case are cut off, so that no decoder reads them."""
    code = classify(model, str(CLASSIFY / "heic" / name))
    out, err = capsys.readouterr()
    if name == "only":
        assert code == 2 and "none of the 5 images can be read (IMG_0.HEIC" in err and err.count("error: ") == 1
        return
    assert code == 0
    rows = {row["image"]: row["error"] for row in json.loads(out)}
    assert list(rows) == sorted(rows) and not rows.pop("a.jpg")
    assert len(rows) == 6 and all(rows.values())
    assert "not read: 6 of 7 images" in err


@pytest.mark.parametrize("end", ["HEIC", "heif", "jpg"])
def test_a_picture_of_a_telephone_is_classified_whatever_its_name(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], end: str
) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    with Image.open(io.BytesIO(picture(3))) as image:
        pillow_heif.from_pillow(image).save(tmp_path / "made.heic")
    (tmp_path / "made.heic").rename(tmp_path / f"IMG_0.{end}")
    assert classify(model, str(tmp_path)) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["image"] == f"IMG_0.{end}" and row["error"] == ""

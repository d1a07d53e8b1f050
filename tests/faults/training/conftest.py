from pathlib import Path

import pytest

from tests.tiny import write_corpus

from .faulty import ends, weights


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """The folder of a run on two ranks to which nothing happens."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert ends(2, folder, corpus) == [0, 0]
    assert weights(folder)
    return folder

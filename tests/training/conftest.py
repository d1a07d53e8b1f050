import pytest

from tests.tiny import tiny_config, write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def make_config(corpus, tmp_path):
    def make(*overrides: str):
        return tiny_config(corpus, tmp_path / "run", *overrides)

    return make

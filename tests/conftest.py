"""What all tests share: one torch thread a process, and no model hub."""

import os

import pytest
from hypothesis import settings

# Before anything imports torch. Spawned processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

settings.register_profile("contrastive", deadline=None)  # how long an example takes is no part of its result
settings.load_profile("contrastive")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The file of the longest test goes first: at the end the other workers would have nothing to do beside it."""
    items.sort(key=lambda item: item.path.name != "test_readme.py")

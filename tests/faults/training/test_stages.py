"""Killed at the edge of a stage, on two ranks, a run in stages ends as the one that was not."""

import signal
from pathlib import Path

import pytest

from .faulty import STEPS, ends, same, seen, weights

STAGES = [
    "model.image.size=32",
    "train.curriculum=[{until: 4, size: 8, context: 3}, {until: 50%, size: 16}]",
    "model.image.patch_dropout=0.5",
    "train.unmasked_tail=25%",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    folder = tmp_path_factory.mktemp("stages")
    assert ends(2, folder, corpus, *STAGES) == [0, 0]
    return folder


@pytest.mark.parametrize("number", [3, 4, 6, 9, 10])
def test_all_ranks_killed_at_the_edge_of_a_stage(tmp_path: Path, corpus: Path, whole: Path, number: int) -> None:
    options = [*STAGES, "data.workers=1"]
    assert ends(2, tmp_path, corpus, *options, fault=("signal_at", (signal.SIGKILL, number, [0, 1]))) == [-9, -9]
    assert ends(2, tmp_path, corpus, *options) == [0, 0]
    assert sorted(seen(tmp_path)) == list(range(1, STEPS + 1))
    assert seen(tmp_path) == seen(whole)
    assert same(weights(tmp_path), weights(whole))


def test_a_signal_to_one_rank_at_the_edge_of_a_stage_stops_both(tmp_path: Path, corpus: Path, whole: Path) -> None:
    assert ends(2, tmp_path, corpus, *STAGES, fault=("signal_at", (signal.SIGTERM, 5, [1]))) == [0, 0]
    assert ends(2, tmp_path, corpus, *STAGES) == [0, 0]
    assert seen(tmp_path) == seen(whole)
    assert same(weights(tmp_path), weights(whole))

"""Too much bad data stops a run, all ranks at the same step, with what to mend."""

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest

from contrastive.shards import Rejection
from contrastive.training import Skips, TooManySkips, check_share
from tests.distributed.spawn import run_ranks

from .faulty import corpus_with, lines, run, state


def bad(count: int) -> list[Rejection]:
    return [Rejection(0, "s/00000.tar", f"key-{i}", "not an image") for i in range(count)]


def skips(limit: float = 0.01, size: int = 10**6, batch: int = 100, path: Path | None = None) -> Skips:
    return Skips(limit, size, batch, path)


def test_one_percent_at_a_limit_of_one_percent_goes_on() -> None:
    counted = skips()
    for step in range(1, 301):
        counted.add(step, bad(1))
    assert counted.counts == {"not an image": 300}


def test_five_percent_at_a_limit_of_one_percent_stops_as_soon_as_the_window_cannot_be_saved() -> None:
    counted = skips()
    with pytest.raises(TooManySkips, match=r"0.01 is passed at step 21: 105 of the latest 2,100 pairs \(5.0%\)"):
        for step in range(1, 301):
            counted.add(step, bad(5))
    assert counted.counts == {"not an image": 100}  # those of the steps that were trained


def test_a_bad_stretch_counts_within_its_window_only() -> None:
    counted = skips()
    for step in range(1, 1001):  # 90 of 10,000 in every hundredth step, 0.9 %
        counted.add(step, bad(90 if step % 100 == 0 else 0))
    with pytest.raises(TooManySkips):
        counted.add(1001, bad(11))


def test_a_set_smaller_than_the_window_is_judged_by_its_epoch() -> None:
    counted = skips(size=1000)
    counted.add(1, bad(10))
    with pytest.raises(TooManySkips):
        counted.add(2, bad(1))


def test_a_first_epoch_without_a_pair_stops_whatever_the_limit() -> None:
    counted = skips(limit=1.0, size=300)
    counted.add(1, bad(100))
    counted.add(2, bad(100))
    with pytest.raises(
        TooManySkips, match="not one of the first 300 pairs can be used .*not an image: 300; such as key-0"
    ):
        counted.add(3, bad(100))


def test_a_later_epoch_without_a_pair_may_pass_a_limit_of_one() -> None:
    counted = skips(limit=1.0, size=300)
    counted.add(1, bad(99))
    for step in range(2, 10):
        counted.add(step, bad(100))


def test_counts_and_window_go_through_a_checkpoint() -> None:
    one, other = skips(), skips()
    for step in range(1, 15):
        one.add(step, bad(step % 3))
    other.restore(one.state())
    assert other.state() == one.state()
    for counted in (one, other):
        with pytest.raises(TooManySkips, match="at step 15: 115 of the latest 1,500"):
            counted.add(15, bad(100))


@pytest.mark.parametrize(("limit", "refused"), [(0.01, True), (0.0625, False), (0.06, True), (1.0, False)])
def test_what_indexing_left_out_counts_before_the_first_step(limit: float, refused: bool) -> None:
    rejected = {"no caption": 4, "no image": 2}  # of 96
    if not refused:
        check_share(rejected, 90, limit, "data/mine")
        return
    with pytest.raises(
        TooManySkips, match=r"6 of 96 samples in data/mine \(6.2%\) .*no caption: 4, no image: 2.*index.json"
    ):
        check_share(rejected, 90, limit, "data/mine")


# ---- whole runs


def train(rank: int, world: int, corpus: Path, run_dir: Path, overrides: list[str]) -> dict[str, Any]:
    return run(rank, world, corpus, run_dir, overrides)


@pytest.mark.parametrize("world", [1, 2])
def test_five_percent_bad_stops_all_ranks_at_the_same_step(tmp_path: Path, world: int) -> None:
    corpus = corpus_with(tmp_path / "c", bad=20, copies=10)  # 20 of 400; above 4 of an epoch is too many
    overrides = ["train.steps=50", "checkpoint.every=1", "checkpoint.keep=60"]
    ended = run_ranks(world, train, corpus, tmp_path / "r", overrides)
    assert len({rank["error"] for rank in ended}) == 1
    error, written = ended[0]["error"], lines(tmp_path / "r")
    assert error is not None and "data.max_skip_rate: 0.01 is passed at step" in error and "rejected.jsonl" in error
    assert f"truncated or damaged: {len(written)}" in error and "raise data.max_skip_rate" in error
    stopped = written[-1]["step"]
    assert f"at step {stopped}:" in error and f"goes on from step {stopped - 1}" in error
    newest = state(tmp_path / "r", stopped - 1)
    before = [line for line in written if line["step"] < stopped]
    assert newest["loader"]["counters"]["counts"] == {"truncated or damaged": len(before)}
    assert len(before) <= 4 < len(written)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("limit", ["0.01", "1.0"])
def test_a_set_of_damaged_images_only_ends_within_its_first_epoch(tmp_path: Path, world: int, limit: str) -> None:
    corpus = corpus_with(tmp_path / "c", bad=40)
    overrides = [f"data.max_skip_rate={limit}", "train.steps=50"]
    ended = run_ranks(world, train, corpus, tmp_path / "r", overrides)
    for rank in ended:
        assert "pairs can be used" in rank["error"] and "truncated or damaged" in rank["error"]
        assert ".png in " in rank["error"] or "0-" in rank["error"]  # the keys that were found
    assert lines(tmp_path / "r")[-1]["step"] <= 3


@pytest.mark.parametrize("world", [1, 2])
def test_a_set_of_which_indexing_leaves_out_too_much_is_not_trained_on(tmp_path: Path, world: int) -> None:
    corpus = corpus_with(tmp_path / "c", bad=0)
    members = corpus / "shards" / "00003.tar"
    with tarfile.open(members) as tar:
        captions = ("39.txt", "39.json")  # either would be one
        kept = [(one, tar.extractfile(one).read()) for one in tar if not one.name.endswith(captions)]  # type: ignore[union-attr]
    with tarfile.open(members, "w") as tar:
        for member, data in kept:
            tar.addfile(member, io.BytesIO(data))
    ended = run_ranks(world, train, corpus, tmp_path / "r", [])
    for rank in ended:
        assert "1 of 40 samples in" in rank["error"] and "no caption: 1" in rank["error"]
        assert "data.max_skip_rate: 0.01 is passed before the first step" in rank["error"]
    (again,) = run_ranks(1, train, corpus, tmp_path / "r", ["data.max_skip_rate=0.03"])
    assert again["error"] is None

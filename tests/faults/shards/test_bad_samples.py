"""A pair that cannot be used costs its own place and nothing else, and is told exactly once."""

import json
import math
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from contrastive.shards import ShardIndex
from contrastive.shards.record import Rejected
from tests.distributed.spawn import run_ranks

from .faulty import at_step, corpus_with, lines, losses, run, state

TOLERANT = ["data.max_skip_rate=1.0", "train.steps=8", "checkpoint.every=2", "checkpoint.keep=9"]


def train(
    rank: int, world: int, corpus: Path, run_dir: Path, overrides: list[str], options: dict[str, Any]
) -> dict[str, Any]:
    return run(rank, world, corpus, run_dir, overrides, **options)


def trained(world: int, corpus: Path, run_dir: Path, *overrides: str, **options: Any) -> list[dict[str, Any]]:
    return run_ranks(world, train, corpus, run_dir, [*TOLERANT, *overrides], options)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus_with(tmp_path_factory.mktemp("corpus"), bad=8)


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert trained(1, corpus, folder)[0]["error"] is None
    return folder


def test_every_bad_pair_is_told_once_in_each_epoch(whole: Path) -> None:
    # 8 steps of 16 are three epochs of forty and a fifth of the fourth
    events = Counter((line["epoch"], line["key"]) for line in lines(whole))
    assert set(events.values()) == {1}
    assert [sum(epoch == e for epoch, _ in events) for e in range(3)] == [8, 8, 8]
    assert {line["reason"] for line in lines(whole)} == {"truncated or damaged"}
    assert all(Path(line["shard"]).is_file() for line in lines(whole))
    assert state(whole, 8)["loader"]["counters"]["counts"] == {"truncated or damaged": len(lines(whole))}


def test_two_processes_with_workers_tell_what_one_tells(corpus: Path, whole: Path, tmp_path: Path) -> None:
    trained(2, corpus, tmp_path, "data.workers=1")
    assert lines(tmp_path) == lines(whole)
    assert state(tmp_path, 8)["loader"] == state(whole, 8)["loader"]


def test_resuming_loses_and_repeats_no_line(corpus: Path, whole: Path, tmp_path: Path) -> None:
    trained(1, corpus, tmp_path, stop_after=6)
    # as a kill behind step 6 would leave it: steps 5 and 6 are written, the newest checkpoint is that of step 4
    import shutil

    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_6")
    with (tmp_path / "run" / "rejected.jsonl").open("a") as file:
        file.write('{"step": 7, "ep')
    trained(2, corpus, tmp_path, resume=True)
    assert lines(tmp_path) == lines(whole)
    assert state(tmp_path, 8)["loader"] == state(whole, 8)["loader"]


@pytest.mark.parametrize("world", [1, 2])
def test_batches_without_a_valid_pair_on_a_rank_or_on_all_are_trained(tmp_path: Path, world: int) -> None:
    corpus = corpus_with(tmp_path / "c", bad=36)
    overrides = ["train.global_batch=4", "train.steps=20", "track.log_every=1"]
    for rank in trained(world, corpus, tmp_path / "r", *overrides):
        assert rank["error"] is None
    rejected = Counter(line["step"] for line in lines(tmp_path / "r"))
    assert 4 in rejected.values()  # whole batches were bad
    assert len(losses(tmp_path / "r")) == 20 and all(math.isfinite(loss) for loss in losses(tmp_path / "r"))


def with_refusal(
    rank: int, world: int, corpus: Path, run_dir: Path, reason: str, overrides: list[str]
) -> dict[str, Any]:
    """From the second half of the run on, reads of the second shard are refused, as they are when it is gone."""
    plain, calls = ShardIndex.pair, [0]

    def pair(self: ShardIndex, i: int) -> tuple[bytes, str]:
        calls[0] += 1
        if self.shard[i] == 1 and calls[0] > 4 * 16 // world:
            raise Rejected(reason)
        return plain(self, i)

    ShardIndex.pair = pair  # type: ignore[method-assign]
    return run(rank, world, corpus, run_dir, overrides)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("reason", ["shard unavailable", "shard changed since indexing"])
def test_a_shard_lost_in_the_run_is_counted_and_the_limit_decides(tmp_path: Path, world: int, reason: str) -> None:
    corpus = corpus_with(tmp_path / "c", bad=0)
    tolerant = run_ranks(world, with_refusal, corpus, tmp_path / "a", reason, TOLERANT)
    assert [rank["error"] for rank in tolerant] == [None] * world
    assert {line["reason"] for line in lines(tmp_path / "a")} == {reason}
    assert {Path(line["shard"]).name for line in lines(tmp_path / "a")} == {"00001.tar"}
    strict = run_ranks(world, with_refusal, corpus, tmp_path / "b", reason, ["train.steps=8"])
    assert len({rank["error"] for rank in strict}) == 1
    assert reason in strict[0]["error"] and "data.max_skip_rate: 0.01 is passed at step 5" in strict[0]["error"]


def with_overwritten_shard(rank: int, world: int, corpus: Path, run_dir: Path) -> dict[str, Any]:
    os.environ["OVERWRITTEN"] = str(corpus / "shards" / "00001.tar")
    at_step(4, overwrite)
    return run(rank, world, corpus, run_dir, TOLERANT)


def overwrite() -> None:
    shard = Path(os.environ["OVERWRITTEN"])
    shard.write_bytes(shard.read_bytes()[::-1])


@pytest.mark.parametrize("world", [1, 2])
def test_a_shard_that_is_overwritten_in_the_run_is_noticed_and_not_read(tmp_path: Path, world: int) -> None:
    corpus = corpus_with(tmp_path / "c", bad=0)
    for rank in run_ranks(world, with_overwritten_shard, corpus, tmp_path / "r"):
        assert rank["error"] is None
    found = lines(tmp_path / "r")
    assert {line["reason"] for line in found} == {"shard changed since indexing"}
    assert {Path(line["shard"]).name for line in found} == {"00001.tar"}


def test_a_key_that_is_no_utf8_is_told_too(tmp_path: Path) -> None:
    from contrastive.shards import Rejection
    from contrastive.training import Skips

    key = b"caf\xe9".decode("utf-8", "surrogateescape")
    Skips(1.0, 100, 10, tmp_path / "rejected.jsonl").add(1, [Rejection(0, "a.tar", key, "animated")])
    (line,) = (tmp_path / "rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["key"] == key


def test_the_lines_are_those_of_the_checkpoint_after_any_kill(tmp_path: Path) -> None:
    from contrastive.shards import Rejection
    from contrastive.training import Skips

    path, choice = tmp_path / "rejected.jsonl", random.Random(0)
    reasons = [Rejection(0, "a.tar", str(step), "animated") for step in range(40)]
    counted, kept, step = Skips(1.0, 1000, 10, path), None, 0
    while step < 40:
        counted.add(step + 1, [reasons[step]] if step % 3 else [])
        step += 1
        if choice.random() < 0.3:
            kept = (step, json.loads(json.dumps(counted.state())))
        elif kept and choice.random() < 0.3:
            counted = Skips(1.0, 1000, 10, path)
            counted.restore(kept[1])
            step = kept[0]
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == [str(i) for i in range(40) if i % 3]
    assert counted.counts == {"animated": sum(1 for i in range(40) if i % 3)}

"""Making shards that is killed, doubled or out of room, and what must come of it."""

import json
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from contrastive.errors import UserError
from contrastive.shards import Filters, make_shards, making, open_index, open_source
from tests.distributed.spawn import PATIENCE

from ...shards.conftest import encoded

FORK = multiprocessing.get_context("fork")  # a child that has imported everything already


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Seven rows, one of them no image and one a repeated caption."""
    images = [encoded(i) for i in range(6)] + [b"<html>"]
    captions = ["a", "b", "c", "a", "e", "f", "g"]
    pq.write_table(pa.table({"image": images, "caption": captions}), tmp_path / "x.parquet")
    return tmp_path / "x.parquet"


def make(source: Path, dest: Path, **options: Any) -> None:
    make_shards(open_source(source), dest, samples_per_shard=3, filters=Filters(deduplicate="caption"), **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def in_child(work: Callable[[], None]) -> int | None:
    child = FORK.Process(target=work)
    child.start()
    child.join(PATIENCE)
    return child.exitcode


def killed_at(call: int, owner: Any, name: str, after: bool, source: Path, dest: Path) -> int | None:
    """Run a child that is killed at the n-th call of a function, before or after it; its exit code."""

    def work() -> None:
        real, calls = getattr(owner, name), 0

        def counted(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*arguments)
            if calls == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, counted)
        make(source, dest)

    return in_child(work)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(("owner", "name", "least"), [(os, "replace", 14), (making, "add_pair", 5)])
def test_killed_at_every_step_then_restarted_gives_the_same_bytes(
    source: Path, tmp_path: Path, owner: Any, name: str, least: int, after: bool
) -> None:
    """Every rename is a boundary (settings, hashes, shard, counts, manifest, destination); every pair added is in
    the middle of a write."""
    make(source, tmp_path / "undisturbed")
    kills = 0
    for call in range(1, 100):
        dest = tmp_path / f"{call}"
        if killed_at(call, owner, name, after, source, dest) == 0:
            break
        kills += 1
        assert not dest.exists() or contents(dest) == contents(tmp_path / "undisturbed")  # all or nothing
        make(source, dest)
        assert contents(dest) == contents(tmp_path / "undisturbed")
        assert not dest.with_name(f"{call}.unfinished").exists()
    assert kills >= least


def test_killed_while_replacing_old_shards_gives_the_new_ones(source: Path, tmp_path: Path) -> None:
    make(source, tmp_path / "new")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "00000.tar").write_bytes(b"old")

    def work() -> None:
        real = os.replace

        def replace(before: Any, after: Any) -> None:
            real(before, after)
            if Path(after).name == ".a.old":
                os.kill(os.getpid(), signal.SIGKILL)

        os.replace = replace
        make(source, tmp_path / "a", overwrite=True)

    assert in_child(work) == -signal.SIGKILL
    make(source, tmp_path / "a", overwrite=True)
    assert contents(tmp_path / "a") == contents(tmp_path / "new")
    assert not (tmp_path / ".a.old").exists()


def test_a_restart_makes_only_what_is_missing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert killed_at(4, making, "add_pair", False, source, tmp_path / "a") == -signal.SIGKILL  # in the second part
    done = []
    real = making.make_part
    monkeypatch.setattr(making, "make_part", lambda job, task: (done.append(task.part.number), real(job, task)))
    make(source, tmp_path / "a")
    assert done == [1, 2]


def test_an_unfinished_run_is_no_data_set(source: Path, tmp_path: Path) -> None:
    killed_at(4, making, "add_pair", False, source, tmp_path / "a")
    assert (tmp_path / "a.unfinished").is_dir()
    assert not (tmp_path / "a.unfinished" / "manifest.json").exists()
    with pytest.raises(UserError, match="a: no such file"):
        open_index(tmp_path / "a")


def test_a_restart_with_other_settings_is_refused(source: Path, tmp_path: Path) -> None:
    killed_at(4, making, "add_pair", False, source, tmp_path / "a")
    with pytest.raises(UserError, match="begun with other settings.*delete that folder"):
        make_shards(open_source(source), tmp_path / "a", samples_per_shard=2)
    make(source, tmp_path / "a")


def test_a_source_that_changed_since_is_refused(source: Path, tmp_path: Path) -> None:
    killed_at(4, making, "add_pair", False, source, tmp_path / "a")
    os.utime(source, (1, 1))
    with pytest.raises(UserError, match="another state of the source"):
        make(source, tmp_path / "a")


def test_of_two_processes_that_make_the_same_one_is_refused(source: Path, tmp_path: Path) -> None:
    def slowly() -> None:
        real = making.add_pair
        making.add_pair = lambda *arguments: (time.sleep(0.5), real(*arguments))
        make(source, tmp_path / "a")

    child = FORK.Process(target=slowly)
    child.start()
    deadline = time.monotonic() + PATIENCE
    while not list(tmp_path.glob("a.unfinished/*.tar.*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(UserError, match="another process is making these shards"):
        make(source, tmp_path / "a")
    child.join(PATIENCE)
    assert child.exitcode == 0
    make(source, tmp_path / "undisturbed")
    assert contents(tmp_path / "a") == contents(tmp_path / "undisturbed")


def test_a_full_disk_is_one_line_and_leaves_nothing_half_made(source: Path, tmp_path: Path) -> None:
    """A limit on the size of a file stands for the disk: the same kind of error, at the same call."""

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, 9_000))  # hashes fit, a shard of 10,240 bytes does not
        try:
            make(source, tmp_path / "a")
        except UserError as error:
            (tmp_path / "said").write_text(str(error))

    assert in_child(work) == 0
    said = (tmp_path / "said").read_text()
    assert "00000.tar" in said and "make room and run the same command again" in said and "\n" not in said
    assert not (tmp_path / "a").exists()
    left = [path.name for path in (tmp_path / "a.unfinished").iterdir()]
    assert sorted(left) == ["parts", "settings.json"]
    make(source, tmp_path / "a")
    make(source, tmp_path / "undisturbed")
    assert contents(tmp_path / "a") == contents(tmp_path / "undisturbed")


def test_what_cannot_be_used_is_counted(source: Path, tmp_path: Path) -> None:
    make(source, tmp_path / "a")
    saved = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert (saved["pairs"], saved["skipped"]) == (5, {"duplicate caption": 1, "unknown image format": 1})

"""Processes that want the same shard at the same moment."""

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from contrastive.shards.storage import ShardUnavailable, local_path
from tests.distributed.spawn import PATIENCE

from .server import Store, serve

TAR = np.random.default_rng(1).bytes(2_000_000)
PROGRAM = """
import hashlib, sys
from contrastive.shards.storage import local_path
print("ready", flush=True)
sys.stdin.readline()
for url in sys.argv[1:]:
    print(hashlib.sha256(local_path(url).read_bytes()).hexdigest(), flush=True)
"""


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setenv("CONTRASTIVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CONTRASTIVE_REMOTE_WAIT", "0.05")
    with serve() as store:
        store.files = {"a.tar": TAR, "b.tar": TAR[::-1]}
        yield store


def together(count: int, urls: list[str]) -> list[list[str]]:
    """What `count` processes that start at the same moment print of the shards."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *urls], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(count)
    ]
    try:
        for process in processes:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        return [process.communicate("\n", timeout=PATIENCE)[0].split() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.parametrize("fault", ["slow", "500"])
def test_the_second_waits_for_the_first_and_both_are_right(store: Store, fault: str) -> None:
    """The store sees one whole download of each shard, however many ask."""
    store.faults["a.tar"] = [fault]
    digests = [hashlib.sha256(data).hexdigest() for data in (TAR, TAR[::-1])]
    assert together(3, [store.url("a.tar"), store.url("b.tar")]) == [digests] * 3
    assert sorted(store.gets) == ["a.tar"] * (2 if fault == "500" else 1) + ["b.tar"]


def test_waiting_for_another_process_ends_at_the_deadline(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.faults["a.tar"] = ["stall"]
    monkeypatch.setenv("CONTRASTIVE_REMOTE_STALL", "60")
    other = subprocess.Popen([sys.executable, "-c", PROGRAM, store.url("a.tar")], stdin=subprocess.PIPE, text=True)
    try:
        assert other.stdin is not None
        other.stdin.write("\n")
        other.stdin.flush()
        while "a.tar" not in store.gets:
            time.sleep(0.02)
        monkeypatch.setenv("CONTRASTIVE_REMOTE_DEADLINE", "0.5")
        started = time.monotonic()
        with pytest.raises(ShardUnavailable, match=r"a\.tar: another process was still fetching it after 0\.5 s; see"):
            local_path(store.url("a.tar"))
        assert time.monotonic() - started < 30
    finally:
        other.kill()
        other.communicate()


def test_a_lock_file_left_by_a_dead_process_is_harmless(store: Store) -> None:
    path = local_path(store.url("a.tar"))
    lock = path.with_suffix(".lock")
    assert lock.exists()
    lock.write_text("of a process that is gone")
    path.unlink()
    assert local_path(store.url("a.tar")).read_bytes() == TAR


def test_a_forked_process_does_not_keep_the_lock(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loader's worker, forked while another thread fetched, has the lock's file open as long as it lives."""
    from contrastive.shards import storage

    child = 0
    attempts = storage._Copy._attempts

    def attempts_beside_a_fork(self: storage._Copy, lock: int, deadline: float) -> None:
        nonlocal child
        child = child or os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        attempts(self, lock, deadline)

    monkeypatch.setattr(storage._Copy, "_attempts", attempts_beside_a_fork)
    try:
        path = local_path(store.url("a.tar"))
        path.unlink()
        monkeypatch.setenv("CONTRASTIVE_REMOTE_DEADLINE", "10")
        assert local_path(store.url("a.tar")).read_bytes() == TAR
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)

"""What the disk does to a checkpoint: at every write, sync and rename of a save there is a whole one to go on from."""

import json
import os
import pickle
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from contrastive.training.checkpoint import Snapshot, newest_whole, prune, write_checkpoint

from .faulty import ends, same, seen, steps_saved, weights

# ---- a save alone, cut at every operation on the disk


def snapshot(step: int) -> Snapshot:
    values = torch.arange(5000.0) + step
    return Snapshot(
        {"step": step}, {"model": {"w": values}, "optimizer": {"0.exp_avg": values}, "random_0": {"t": values}}
    )


class Operations:
    """Counts writes, syncs, renames and removals, and does `action` in place of number `at`."""

    def __init__(self, at: int, action: Callable[[], None]) -> None:
        self.count, self.at, self.action = 0, at, action
        self.plain = {name: getattr(os, name) for name in ("fsync", "rename")}
        self.rmtree, self.save = shutil.rmtree, safetensors.torch.save_file

    def _next(self) -> None:
        self.count += 1
        if self.count == self.at:
            self.action()

    def __enter__(self) -> "Operations":
        for name, plain in self.plain.items():
            setattr(os, name, lambda *a, plain=plain: [self._next(), plain(*a)][1])
        shutil.rmtree = lambda *a, **k: [self._next(), self.rmtree(*a, **k)][1]  # type: ignore[assignment]
        safetensors.torch.save_file = self._save
        return self

    def __exit__(self, *_: Any) -> None:
        for name, plain in self.plain.items():
            setattr(os, name, plain)
        shutil.rmtree = self.rmtree
        safetensors.torch.save_file = self.save

    def _save(self, tensors: Any, path: Path) -> None:
        """In two halves, so that a fault leaves half a file."""
        data = safetensors.torch.save(tensors)
        path.write_bytes(data[: len(data) // 2])
        self._next()
        path.write_bytes(data)


def save(folder: Path) -> None:
    write_checkpoint(folder, snapshot(6))
    prune(folder, keep=1, keep_every=None, best=None)


def operations(folder: Path) -> int:
    with Operations(0, lambda: None) as counted:
        save(folder)
    return counted.count


def assert_a_whole_one_is_there(folder: Path) -> None:
    path, damaged = newest_whole(folder)
    assert path is not None and not damaged
    assert path.name in ("step_3", "step_6")
    value = safetensors.torch.load_file(path / "model.safetensors")["w"]
    assert torch.equal(value, torch.arange(5000.0) + int(path.name[5:]))


def test_a_kill_at_every_operation_of_a_save_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "count", snapshot(3))
    count = operations(tmp_path / "count")
    assert count >= 12  # three files of tensors, five files synced, two folders, a rename, removals
    for number in range(1, count + 1):
        folder = tmp_path / str(number)
        write_checkpoint(folder, snapshot(3))
        child = os.fork()
        if not child:
            with Operations(number, lambda: os.kill(os.getpid(), signal.SIGKILL)):
                save(folder)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        assert_a_whole_one_is_there(folder)
        save(folder)  # the next save finds nothing in its way, and cleans up
        assert [path.name for path in folder.iterdir()] == ["step_6"]


@pytest.mark.parametrize("error", [28, 5], ids=["disk full", "input/output error"])
def test_an_error_at_every_operation_of_a_save_leaves_a_whole_checkpoint_and_no_rest(
    tmp_path: Path, error: int
) -> None:
    def fail() -> None:
        raise OSError(error, os.strerror(error))

    write_checkpoint(tmp_path / "count", snapshot(3))
    for number in range(1, operations(tmp_path / "count") + 1):
        folder = tmp_path / str(number)
        write_checkpoint(folder, snapshot(3))
        try:
            with Operations(number, fail):
                save(folder)
        except OSError:
            pass
        assert_a_whole_one_is_there(folder)


# ---- a whole run


def resumes_from(run_dir: Path, corpus: Path, undisturbed: Path) -> None:
    assert ends(2, run_dir, corpus) == [0, 0]
    assert seen(run_dir) == seen(undisturbed)
    assert same(weights(run_dir), weights(undisturbed))


@pytest.fixture
def stopped(tmp_path: Path, corpus: Path) -> Path:
    """The newest checkpoint, of step 6, of a run that was told to stop; there is one of step 3 too."""
    assert ends(2, tmp_path, corpus, fault=("signal_at", (signal.SIGTERM, 4, [0]))) == [0, 0]
    newest = tmp_path / "run" / "checkpoints" / "step_6"
    assert newest.is_dir()
    return newest


def flip_a_bit(newest: Path) -> None:
    data = bytearray((newest / "model.safetensors").read_bytes())
    data[-100] ^= 1
    (newest / "model.safetensors").write_bytes(data)


def cut(newest: Path) -> None:
    os.truncate(newest / "optimizer.safetensors", 1000)


def remove(name: str) -> Callable[[Path], None]:
    return lambda newest: (newest / name).unlink()


class Canary:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (os.environ["CANARY"],)


def put_a_pickle(newest: Path) -> None:
    (newest / "optimizer.safetensors").write_bytes(pickle.dumps(Canary()))


def add_a_pickle(newest: Path) -> None:
    (newest / "optimizer.pt").write_bytes(pickle.dumps(Canary()))
    (newest / "random_0.pt").write_bytes(pickle.dumps(Canary()))


def spoil_the_manifest(newest: Path) -> None:
    (newest / "manifest.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (flip_a_bit, "model.safetensors is not what was written (sha256)"),
        (cut, "optimizer.safetensors has 1,000 bytes in place of"),
        (remove("optimizer.safetensors"), "optimizer.safetensors is missing"),
        (remove("random_1.safetensors"), "random_1.safetensors is missing"),
        (remove("manifest.json"), "manifest.json is missing"),
        (spoil_the_manifest, "manifest.json cannot be read"),
        (put_a_pickle, "optimizer.safetensors has"),
    ],
    ids=["bit", "cut", "optimizer", "random", "no manifest", "manifest", "pickle"],
)
def test_a_damaged_newest_checkpoint_is_passed_over(
    stopped: Path, tmp_path: Path, corpus: Path, undisturbed: Path, damage: Any, what: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("CANARY", str(tmp_path / "canary"))
    damage(stopped)
    path, faults = newest_whole(stopped.parent)
    assert path is not None and path.name == "step_3" and faults["step_6"].startswith(what)
    resumes_from(tmp_path, corpus, undisturbed)
    assert not (tmp_path / "canary").exists()
    assert (stopped.parent / ".damaged_step_6").is_dir()  # kept for whoever wants to look at it


def test_a_pickle_among_the_files_is_never_opened(
    stopped: Path, tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CANARY", str(tmp_path / "canary"))
    add_a_pickle(stopped)
    ends(2, tmp_path, corpus)
    errors = [json.loads(path.read_text())["error"] for path in sorted(tmp_path.glob("ended-*.json"))]
    assert all("optimizer.pt is not of a checkpoint" in error for error in errors)
    assert (stopped / "optimizer.pt").exists() and not (tmp_path / "canary").exists()


def test_what_a_killed_save_left_is_in_nobodys_way(
    stopped: Path, tmp_path: Path, corpus: Path, undisturbed: Path
) -> None:
    for step in (6, 9, 12):
        shutil.copytree(stopped, stopped.parent / f".partial_step_{step}")
    resumes_from(tmp_path, corpus, undisturbed)
    assert not list(stopped.parent.glob(".partial*"))


def test_when_all_are_damaged_the_run_says_so_and_deletes_nothing(stopped: Path, tmp_path: Path, corpus: Path) -> None:
    for path in stopped.parent.iterdir():
        cut(path)
    before = sorted(str(path) for path in (tmp_path / "run").rglob("*"))
    assert ends(2, tmp_path, corpus) == [0, 0]
    assert sorted(str(path) for path in (tmp_path / "run").rglob("*")) == before
    errors = [json.loads(path.read_text())["error"] for path in sorted(tmp_path.glob("ended-*.json"))]
    assert (
        errors[0] == errors[1] and "every checkpoint in" in errors[0] and "step_3: optimizer.safetensors" in errors[0]
    )


@pytest.mark.parametrize(
    "fault", [("error_in_save", "disk full"), ("error_in_save", "exception"), ("small_files", 20_000)]
)
def test_a_checkpoint_that_cannot_be_written_stops_both_ranks_and_the_one_before_stays(
    tmp_path: Path, corpus: Path, undisturbed: Path, fault: Any
) -> None:
    assert ends(2, tmp_path, corpus, fault=fault) == [0, 0]
    assert steps_saved(tmp_path) == ["step_3"]
    errors = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("ended-*.json"))]
    assert len({error["error"] for error in errors}) == 1
    assert "the checkpoint of step 6 could not be written" in errors[0]["error"]
    assert "the one before is whole. Make room and go on with --resume" in errors[0]["error"]
    resumes_from(tmp_path, corpus, undisturbed)


def test_a_first_checkpoint_that_cannot_be_written_is_not_said_to_have_one_before_it(
    tmp_path: Path, corpus: Path
) -> None:
    assert ends(2, tmp_path, corpus, "checkpoint.every=6", fault=("error_in_save", "disk full")) == [0, 0]
    assert steps_saved(tmp_path) == []
    errors = [json.loads(path.read_text())["error"] for path in sorted(tmp_path.glob("ended-*.json"))]
    assert errors[0] == errors[1] and "the checkpoint of step 6 could not be written" in errors[0]
    assert "there is none before it. Make room and start again with --overwrite" in errors[0]


def test_a_disk_that_is_gone_is_told_by_both_ranks(tmp_path: Path, corpus: Path) -> None:
    assert ends(2, tmp_path, corpus, fault=("error_in_save_and_behind", None)) == [0, 0]
    errors = [json.loads(path.read_text())["error"] for path in sorted(tmp_path.glob("ended-*.json"))]
    assert errors[0] == errors[1] and "the checkpoint of step 3 could not be written (Input/output error)" in errors[0]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a tmpfs wants root")
def test_a_small_file_system_that_is_full_stops_the_run_with_its_old_checkpoint(
    tmp_path: Path, corpus: Path, undisturbed: Path
) -> None:
    assert ends(2, tmp_path, corpus, fault=("signal_at", (signal.SIGTERM, 1, [0]))) == [0, 0]
    folder = tmp_path / "run" / "checkpoints"
    assert steps_saved(tmp_path) == ["step_3"]
    shutil.copytree(folder, tmp_path / "kept")
    room = sum(path.stat().st_size for path in folder.rglob("*")) * 3 // 2
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(folder)], capture_output=True
    ).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        shutil.copytree(tmp_path / "kept", folder, dirs_exist_ok=True)
        assert ends(2, tmp_path, corpus) == [0, 0]
        error = json.loads((tmp_path / "ended-0.json").read_text())["error"]
        assert "the checkpoint of step 6 could not be written (" in error and "No space left on device" in error
        assert [path.name for path in folder.iterdir()] == ["step_3"]
        assert newest_whole(folder) == (folder / "step_3", {})
    finally:
        subprocess.run(["umount", str(folder)], check=True)

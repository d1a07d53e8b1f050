"""The run folder: files of the user's own stay, and one run at a time has it."""

import fcntl
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from contrastive import locks
from contrastive.cli import main
from contrastive.config import dump_yaml
from contrastive.errors import UserError
from contrastive.locks import Busy, only_one
from contrastive.pretrain import pretrain
from contrastive.run_folder import RunFolder
from contrastive.training.tracking import environment
from tests.distributed.spawn import PATIENCE, run_ranks
from tests.tiny import tiny_config, write_corpus, write_recipe

SHORT = ["train.steps=2", "data.validation=null"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def command(corpus: Path, tmp_path: Path) -> list[str]:
    return ["train", str(write_recipe(corpus, tmp_path / "tiny.yaml")), f"run.dir={tmp_path}/run", *SHORT]


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder, to be copied."""
    folder = tmp_path_factory.mktemp("finished")
    options = [*SHORT, "track.with=[tensorboard]", "eval.report=true"]
    pretrain(tiny_config(corpus, folder / "run", *options), quiet=True)
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> RunFolder:
    copy = tmp_path / "run"
    subprocess.run(["cp", "-a", str(finished), str(copy)], check=True)
    return RunFolder(copy)


def contents(folder: Path) -> dict[str, Any]:
    """Every name below, with the bytes of files and the targets of links."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
    return found


def write(path: Path, text: str = "of the user's own") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def files_of_others() -> list[list[str]]:
    """Folders that no run wrote, as lists of names: those of the report of this defect, and others by chance."""
    # fmt: off
    names = ["model/config.json", "model/model.safetensors", "tensorboard/events.out.tfevents.1", "config.yaml",
             "results.json", "environment.json", "metrics.jsonl", "report.html", "tokenizer.json", "stacks/rank_0.txt",
             "rejected.jsonl", "checkpoints/last.ckpt", "thesis.tex", "checkpoints/step_2/model.safetensors"]
    # fmt: on
    draw = random.Random(0)
    return [[name] for name in names[:5]] + [draw.sample(names, 3) for _ in range(4)]


@pytest.mark.parametrize("option", [[], ["--overwrite"], ["--auto-resume"]])
@pytest.mark.parametrize("names", files_of_others(), ids=" ".join)
def test_a_folder_that_no_run_wrote_is_left_as_it_is(names, option, command, tmp_path, capsys):
    for name in names:
        write(tmp_path / "run" / name)
    before = contents(tmp_path / "run")
    assert main([*command, *option]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and str(tmp_path / "run") in lines[0]
    assert any(Path(name).parts[0] in lines[0] for name in names)
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("names", [[], [".gitkeep", ".DS_Store"]])
def test_a_run_starts_in_an_empty_folder(names, command, tmp_path):
    (tmp_path / "run").mkdir()
    for name in names:
        write(tmp_path / "run" / name)
    assert main(command) == 0
    assert {*names, "model", "results.json"} <= {path.name for path in (tmp_path / "run").iterdir()}
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_run_folder_that_is_a_file_is_refused(command, tmp_path, capsys):
    write(tmp_path / "run")
    assert main(command) == 2
    assert "is a file; name a folder" in capsys.readouterr().err


def test_overwrite_keeps_what_no_run_wrote(command, run):
    own = ["notes.txt", "model/notes.txt", "checkpoints/notes.txt", "tensorboard/other/events.out.tfevents.1",
           "stacks/gdb.txt", "checkpoints/step_two/model.safetensors", "model/old/config.json"]  # fmt: skip
    for name in own:
        write(run.path / name)
    write(run.checkpoints / ".partial_step_7" / "model.safetensors", "left by a kill")
    old = run.metrics.read_bytes()
    assert main([*command, "--overwrite", "train.steps=3"]) == 0
    found = contents(run.path)
    assert all(found[name] == b"of the user's own" for name in own)
    assert run.metrics.read_bytes() != old
    steps = [name for name in found if "step_" in name and "/" not in name.removeprefix("checkpoints/")]
    assert steps == ["checkpoints/step_3", "checkpoints/step_two"]
    assert not list((run.tensorboard / "contrastive").glob("*")) and not run.report.exists()


@pytest.mark.parametrize("option", ["--overwrite", "--resume"])
@pytest.mark.parametrize(
    "name", ["results.json", "metrics.jsonl", "report.html", "model/config.json", "tokenizer.json"]
)
def test_a_name_that_a_run_writes_and_the_user_has_is_refused(name, option, command, run, capsys):
    write(run.path / name, '{"of the": "user"}')
    before = contents(run.path)
    assert main([*command, option]) == 2
    assert name.partition("/")[0] in capsys.readouterr().err
    assert contents(run.path) == before


def test_a_file_of_the_user_in_a_checkpoint_keeps_it(command, run, capsys):
    write(run.checkpoints / "step_2" / "notes.txt")
    before = contents(run.path)
    assert main([*command, "--overwrite"]) == 2
    assert "step_2/notes.txt is not of a checkpoint" in capsys.readouterr().err
    assert contents(run.path) == before


@pytest.mark.parametrize("name", ["checkpoints", "model", "tensorboard", "tensorboard/contrastive", "results.json",
                                  "checkpoints/step_2", "stacks"])  # fmt: skip
def test_nothing_is_deleted_through_a_link_out_of_the_folder(name, command, run, tmp_path, capsys):
    inside, outside = run.path / name, tmp_path / "elsewhere"
    if inside.exists():
        inside.rename(outside)
    else:
        write(outside / "rank_0.txt")
    inside.symlink_to(outside)
    before = contents(outside) if outside.is_dir() else outside.read_bytes()
    assert main([*command, "--overwrite"]) == 2
    assert str(inside) in capsys.readouterr().err
    assert (contents(outside) if outside.is_dir() else outside.read_bytes()) == before and inside.is_symlink()


@pytest.mark.parametrize("option", ["--overwrite", "--resume"])
def test_what_a_kill_left_aside_is_of_the_run(option, command, run):
    for name in ("checkpoints/.partial_step_1/.tmpL6GwIR", "model/.tmpAbCdEf", "model/model.safetensors.tmp",
                 ".config.yaml.aside", ".lock"):  # fmt: skip
        write(run.path / name)
    assert main([*command, option, "train.steps=3"]) == 0
    assert not (run.checkpoints / ".partial_step_1").exists() and not (run.path / ".lock").exists()


@pytest.mark.parametrize("both", [True, False])
def test_a_run_that_failed_before_its_first_checkpoint_starts_again(both, command, corpus, tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.write(folder.environment, json.dumps(environment()))
    if both:
        folder.write(folder.config, dump_yaml(tiny_config(corpus, folder.path)))
    assert main(command) == 0


@pytest.mark.parametrize("name", ["config.yaml", "environment.json"])
def test_a_run_without_one_of_its_two_files_is_not_overwritten(name, command, run, capsys):
    (run.path / name).unlink()
    before = contents(run.path)
    assert main([*command, "--overwrite"]) == 2
    assert "is not the folder of a run" in capsys.readouterr().err
    assert contents(run.path) == before


def test_checkpoints_that_were_copied_alone_can_be_resumed_from(command, run, tmp_path):
    for path in run.path.iterdir():
        if path.name not in ("checkpoints", "tokenizer.json"):
            subprocess.run(["rm", "-r", str(path)], check=True)
    assert main([*command, "--resume", "train.steps=3"]) == 0
    assert (run.checkpoints / "step_3").is_dir()


def test_a_mistake_leaves_no_folder(command, tmp_path):
    assert main([*command, "data.train=nowhere", f"run.dir={tmp_path}/a/b/run"]) == 2
    assert not (tmp_path / "a").exists()


# ---- one run at a time


@pytest.mark.parametrize("option", [[], ["--resume"], ["--auto-resume"], ["--overwrite"]])
def test_a_second_run_is_refused_and_the_first_is_named(option, command, run, capsys):
    before = contents(run.path)
    with only_one(run.path / ".lock"):
        assert main([*command, *option]) == 2
    line = capsys.readouterr().err.strip()
    assert f"{run.path} is in use by process {os.getpid()} on host {socket.gethostname()}, since 20" in line
    assert "\n" not in line and contents(run.path) == before


def _second(rank: int, world: int, corpus: Path, folder: Path) -> str:
    config = tiny_config(corpus, folder / "run", *SHORT)
    try:
        pretrain(config, resume="if possible", quiet=True)
    except UserError as error:
        return str(error)
    return "not refused"


def test_a_second_run_is_refused_on_all_ranks(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with only_one(tmp_path / "run" / ".lock"):
        lines = run_ranks(2, _second, corpus, tmp_path)
    assert lines[0] == lines[1] and f"is in use by process {os.getpid()}" in lines[0]


def test_the_lock_is_held_from_the_first_file_to_the_last(command, tmp_path, monkeypatch):
    seen = []

    def note(name: str) -> None:
        with pytest.raises(Busy):  # another description of the file: as another process has
            with only_one(tmp_path / "run" / ".lock"):
                pass
        seen.append(name)

    from contrastive import pretrain as room

    for name in ("settle_tokenizer", "evaluate"):
        plain = getattr(room, name)
        monkeypatch.setattr(room, name, lambda *a, plain=plain, name=name: (note(name), plain(*a))[1])
    assert main(command) == 0 and seen == ["settle_tokenizer", "evaluate"]


def test_the_lock_of_a_process_that_was_killed_is_free(tmp_path: Path) -> None:
    path, context = tmp_path / ".lock", multiprocessing.get_context("fork")
    held = context.Event()

    def hold() -> None:
        with only_one(path):
            held.set()
            signal.pause()

    child = context.Process(target=hold)
    child.start()
    assert held.wait(PATIENCE)
    with pytest.raises(Busy, match=f"process {child.pid} on host"):
        with only_one(path):
            pass
    child.kill()
    child.join()
    assert path.exists()
    with only_one(path):
        pass
    assert not path.exists()


def test_a_worker_that_outlives_the_process_does_not_hold_its_lock(tmp_path: Path) -> None:
    path, context = tmp_path / ".lock", multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def hold() -> None:
        with only_one(path):
            worker = context.Process(target=lambda: (theirs.send(os.getpid()), signal.pause()))
            worker.start()
            signal.pause()

    child = context.Process(target=hold)
    child.start()
    worker = ours.recv()
    try:
        child.kill()
        child.join()
        os.kill(worker, 0)  # it lives
        with only_one(path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_program_that_was_started_does_not_hold_the_lock(tmp_path: Path) -> None:
    code = "import os; print(sorted(os.readlink(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd') "
    code += "if os.path.exists(f'/proc/self/fd/{n}')))"
    with only_one(tmp_path / ".lock"):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, close_fds=False)
    assert ".lock" not in done.stdout


@pytest.mark.parametrize("number", ["ENOLCK", "EOPNOTSUPP", "ENOSYS"])
def test_a_file_system_without_locks_is_said_once(number, command, monkeypatch, capsys):
    import errno

    def refuse(handle: int, kind: int) -> None:
        raise OSError(getattr(errno, number), "no locks")

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    assert main(command) == 0
    assert capsys.readouterr().err.count("has no locks") == 1


def test_a_lock_file_that_its_holder_removes_meanwhile_is_made_again(tmp_path, monkeypatch):
    """Between our open and our lock, the file that we opened may be gone."""
    path, plain, calls = tmp_path / ".lock", fcntl.flock, []

    def flock(handle: int, kind: int) -> None:
        if not calls:
            path.unlink()
        calls.append(handle)
        plain(handle, kind)

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    with only_one(path):
        assert path.exists() and len(calls) == 2

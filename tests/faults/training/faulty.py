"""Runs of the tiny recipe in which something befalls a process at a chosen moment; what the fault tests share."""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from contrastive.errors import UserError
from contrastive.pretrain import pretrain
from contrastive.training import checkpoint, step
from contrastive.training.saver import Saver
from contrastive.training.trainer import Trainer
from tests.distributed import spawn
from tests.faults.shards.faulty import children
from tests.tiny import tiny_config

STEPS = 12
OPTIONS = [f"train.steps={STEPS}", "checkpoint.every=3", "data.validation=null"]

Fault = tuple[str, Any]  # the name of a function below, and what it takes


def train(
    rank: int, world: int, corpus: Path, run_dir: Path, overrides: list[str], fault: Fault | None, resume: Any
) -> dict[str, Any]:
    """Train with the fault. The error of a run that ended with one; what each step saw lies beside the run."""
    multiprocessing.set_start_method("fork", force=True)
    config = tiny_config(corpus, run_dir / "run", *OPTIONS, *overrides)
    note_steps(run_dir / f"seen-{rank}.jsonl")
    if fault is not None:
        globals()[fault[0]](rank, fault[1])
    ended: dict[str, Any] = {"error": None}
    try:
        ended["complete"] = pretrain(config, quiet=True, resume=resume) is not None
    except UserError as error:
        ended = {"error": str(error), "complete": False}
    (run_dir / f"ended-{rank}.json").write_text(json.dumps(ended))
    return ended


def ends(
    world: int,
    run_dir: Path,
    corpus: Path,
    *overrides: str,
    fault: Fault | None = None,
    resume: Any = "if possible",
    stuck: int | None = None,
) -> list[int]:
    """Start the ranks, wait until each has ended by itself, at most five minutes; their exit codes.

    A rank that is still there then is killed and counts as -9. `stuck` is one that has been stopped: it is killed once
    the others have ended.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(spawn.PRELOAD)
    folder = run_dir / f"ranks-{time.monotonic_ns()}"
    folder.mkdir(parents=True)
    arguments = (corpus, run_dir, list(overrides), fault, resume)
    processes = [
        context.Process(target=spawn._rank, args=(r, world, 1, str(folder), spawn.PATIENCE, train, arguments))
        for r in range(world)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + spawn.PATIENCE
    for rank in sorted(range(world), key=lambda rank: rank == stuck):
        process = processes[rank]
        if rank == stuck:
            state = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
            assert state == "T", f"rank {rank} is not stopped but {state}"
            process.kill()
        process.join(max(0.1, deadline - time.monotonic()))
        if process.exitcode is None:
            process.kill()
            process.join()
    return [process.exitcode if process.exitcode is not None else -9 for process in processes]


# ---- what is left


def seen(run_dir: Path, world: int = 2) -> dict[int, list[Any]]:
    """Of each step the last time it was done: the keys of the global batch and each rank's loss, by rank."""
    found: dict[int, list[Any]] = {}
    for rank in range(world):
        rows = {}
        for line in (run_dir / f"seen-{rank}.jsonl").read_text().splitlines():
            row = json.loads(line)
            rows[row["step"]] = (row["keys"], row["loss"])
        for number, row in rows.items():
            found.setdefault(number, []).append(row)
    return found


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return checkpoint._load(run_dir / "run" / "model", "model")


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def steps_saved(run_dir: Path) -> list[str]:
    return [path.name for path in checkpoint.list_checkpoints(run_dir / "run" / "checkpoints")]


# ---- what may befall a rank


def note_steps(path: Path) -> None:
    plain = Trainer._agree

    def agree(self: Trainer, stop: bool, batch: Any, fault: Any) -> bool:
        self.keys_of_this_step = [] if batch is None else list(batch.keys)  # type: ignore[attr-defined]
        return plain(self, stop, batch, fault)

    def count(self: Trainer, skipped: bool) -> None:
        loss = float(self.last_loss)  # type: ignore[attr-defined]
        row = {"step": self.step, "keys": self.keys_of_this_step, "loss": loss}  # type: ignore[attr-defined]
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        counted(self, skipped)

    def made(self: Trainer, *arguments: Any, **options: Any) -> None:
        create(self, *arguments, **options)
        inner = self.train_step

        def call(batch: Any, factor: float) -> dict[str, torch.Tensor]:
            metrics = inner(batch, factor)
            self.last_loss = metrics["loss"]  # type: ignore[attr-defined]
            return metrics

        self.train_step = call  # type: ignore[assignment]

    counted, create = Trainer._count_skipped, Trainer.__init__
    Trainer._agree, Trainer._count_skipped, Trainer.__init__ = agree, count, made  # type: ignore[method-assign]


def before_step(number: int, action: Callable[[], None]) -> None:
    """Do something when step `number`, from 0, is about to be computed."""
    plain = Trainer._agree

    def agree(self: Trainer, *arguments: Any) -> bool:
        agreed = plain(self, *arguments)
        if self.step == number:
            action()
        return agreed

    Trainer._agree = agree  # type: ignore[method-assign]


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def signal_at(rank: int, what: tuple[int, int, list[int]]) -> None:
    """A signal to some ranks before a step: (signal, step, ranks)."""
    number, at, ranks = what
    if rank in ranks:
        before_step(at, lambda: send(number))


def signal_to_all(rank: int, number: int) -> None:
    """To the rank and to the workers of its loader, as a scheduler sends it."""

    def action() -> None:
        workers = children(os.getpid())
        assert workers
        for process in [*workers, os.getpid()]:
            os.kill(process, number)

    before_step(4, action)


def signal_twice(rank: int, at: int) -> None:
    before_step(at, lambda: [send(signal.SIGTERM), send(signal.SIGTERM), send(signal.SIGUSR1)] and None)


def signal_in_save(rank: int, number: int) -> None:
    """While the checkpoint is being written, before its commit."""
    if rank == 0:
        in_save(lambda: send(number))


def in_save(action: Callable[[], None]) -> None:
    plain = os.rename

    def rename(source: Any, target: Any) -> None:
        if ".partial_step" in str(source):
            action()
        plain(source, target)

    os.rename = rename  # type: ignore[assignment]


def error_in_save(rank: int, what: str) -> None:
    """A full disk, or any exception, in the one process that writes, at the second checkpoint."""
    if rank != 0:
        return
    plain = checkpoint.write_checkpoint

    def write(folder: Path, snapshot: checkpoint.Snapshot) -> Path:
        if snapshot.step < 6:
            return plain(folder, snapshot)
        raise RuntimeError("out of luck") if what == "exception" else OSError(28, "No space left on device")

    from contrastive.training import saver

    saver.write_checkpoint = write


def error_in_save_and_behind(rank: int, _: Any) -> None:
    """The disk is gone: nothing can be written, nor the folder read."""

    def fail(*_: Any) -> Any:
        raise OSError(5, "Input/output error")

    from contrastive.training import saver

    saver.write_checkpoint = saver.list_checkpoints = fail


def small_files(rank: int, limit: int) -> None:
    """No file may grow beyond the limit, from the second checkpoint on (RLIMIT_FSIZE)."""
    import resource

    def forbid(saver: Saver, snapshot: checkpoint.Snapshot) -> None:
        saver.finish()  # on a busy machine the first checkpoint may still be written
        if snapshot.step >= 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        plain(saver, snapshot)

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python does: the write fails with EFBIG
    plain, Saver.save = Saver.save, forbid  # type: ignore[method-assign]


def signal_in_evaluation(rank: int, number: int) -> None:
    """While the main process validates."""
    if rank == 0:
        plain = Trainer._validate

        def validate(self: Trainer, *arguments: Any) -> None:
            send(number)
            plain(self, *arguments)

        Trainer._validate = validate  # type: ignore[method-assign]


def signal_in_final_evaluation(rank: int, number: int) -> None:
    """Behind the last step, when the main process evaluates the finished model."""
    from contrastive import pretrain as room

    room.evaluate = lambda *_: send(number)


def not_a_number(rank: int, what: tuple[list[int], int]) -> None:
    """The gradient of one rank is NaN in some steps: (steps, rank)."""
    numbers, at = what
    if rank != at:
        return
    plain = step.TrainStep.__call__
    made = [0]

    def call(self: step.TrainStep, batch: Any, factor: float) -> dict[str, torch.Tensor]:
        number, loss = made[0], self.loss
        made[0] += 1
        if number in numbers:
            self.loss = lambda *a, **k: {  # type: ignore[assignment]
                key: value * torch.nan if key == "loss" else value for key, value in loss(*a, **k).items()
            }
        try:
            return plain(self, batch, factor)
        finally:
            self.loss = loss

    step.TrainStep.__call__ = call  # type: ignore[method-assign]


def exception_at(rank: int, what: tuple[int, int]) -> None:
    """A program error on one rank before a step: (step, rank)."""
    number, at = what

    def action() -> None:
        raise RuntimeError("a cosmic ray")

    if rank == at:
        before_step(number, action)


def stop_process(rank: int, what: tuple[int, int]) -> None:
    """One rank is stopped (SIGSTOP) before a step: (step, rank)."""
    if rank == what[1]:
        before_step(what[0], lambda: send(signal.SIGSTOP))


def other_recipe(rank: int, key: str) -> None:
    """Rank 1 was started with another value of a key."""
    from contrastive import pretrain as room

    if rank == 1:
        plain = room.check_same_recipe

        def check(config: Any, accelerator: Any) -> None:
            block, name = key.split(".")
            part = getattr(config, block)
            changed = part.model_copy(update={name: type(getattr(part, name))(1)})
            plain(config.model_copy(update={block: changed}), accelerator)

        room.check_same_recipe = check

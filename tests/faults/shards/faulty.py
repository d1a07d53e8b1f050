"""Runs of the tiny recipe over shards with faults, on one process or several; what the fault tests share."""

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from contrastive.errors import UserError
from contrastive.pretrain import pretrain
from contrastive.shards import PairLoader, Record, open_source, write_shards
from tests.tiny import tiny_config, write_corpus

GOOD = 40  # pairs of the tiny corpus


def corpus_with(folder: Path, bad: int, samples_per_shard: int = 10, copies: int = 1) -> Path:
    """The tiny corpus `copies` times over; evenly spread over it, `bad` images are cut short. Returns the folder."""
    write_corpus(folder)
    records = list(open_source(folder / "images"))
    items = [Record(f"{copy}-{one.key}", one.image, one.captions) for copy in range(copies) for one in records]
    for number in range(bad):
        i = number * len(items) // bad
        image = items[i].image
        assert image is not None
        items[i] = Record(items[i].key, image[: len(image) // 2], items[i].captions)
    write_shards(items, folder / "shards", samples_per_shard=samples_per_shard, overwrite=True)
    return folder


def run(rank: int, world: int, corpus: Path, run_dir: Path, overrides: list[str], **options: Any) -> dict[str, Any]:
    """Train; the error it ended with and its kind, the seconds it took, the workers that are left."""
    torch.set_num_threads(1)
    # what started the rank left its own way, in which a worker imports everything anew: seconds that tests count
    multiprocessing.set_start_method("fork", force=True)
    config = tiny_config(corpus, run_dir / "run", "data.validation=null", *overrides)
    begun, error, kind = time.monotonic(), None, None
    try:
        pretrain(config, quiet=True, **options)
    except UserError as fault:
        error, kind = str(fault), type(fault).__name__
    seconds, workers = time.monotonic() - begun, len(multiprocessing.active_children())
    return {"error": error, "kind": kind, "seconds": seconds, "workers": workers}


def children(parent: int) -> list[int]:
    """Processes that `parent` has started and that are not over."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, of = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(of) == parent and state != "Z":
            found.append(int(stat.parent.name))
    return found


def lines(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "run" / "rejected.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def state(run_dir: Path, step: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_dir / "run" / "checkpoints" / f"step_{step}" / "state.json").read_text())
    return found


def losses(run_dir: Path) -> list[float]:
    rows = [json.loads(line) for line in (run_dir / "run" / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def at_step(step: int, action: Callable[[], None], rank: int = 0) -> None:
    """Do something when the loader of a rank is asked for a step (in the worker, where there are workers).

    `action` is a module-level function: it is pickled where workers are not forked.
    """
    plain = PairLoader.__init__

    def made(self: PairLoader, *args: Any, **options: Any) -> None:
        plain(self, *args, **options)
        if self.place.rank == rank:
            self._items = _Faulty(self._items, step, action)  # type: ignore[assignment]

    PairLoader.__init__ = made  # type: ignore[method-assign]


class _Faulty:
    def __init__(self, items: Any, step: int, action: Callable[[], None]) -> None:
        self.items, self.step, self.action = items, step, action

    def __getitem__(self, step: int) -> Any:
        if step == self.step:
            self.action()
        return self.items[step]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def sleep_for_ever() -> None:
    threading.Event().wait()


def fail() -> None:
    raise UserError("data.train: the disk is on fire")

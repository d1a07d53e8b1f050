"""What the trainer adds to the bare computation of a step, at the pictograms recipe: its model, batch and precision.

    python benchmarks/step.py                 prints tables, writes benchmarks/results/step.json; a quarter of an hour
    python benchmarks/step.py --threads 1     on two cores: the loader has one of its own, as beside a GPU
    python benchmarks/step.py --once          one short run for against.py: a JSON line with the milliseconds of a step

    bare       both towers forward, the loss, backward, the optimizer, on one batch that lies in memory
    resident   the trainer (ranks agree, gradient norm, finite check, clock), its loader hands over that same batch
    trainer    the trainer with the recipe's loader, which draws, augments and tokenises in a process of its own

On a CPU the trainer has its process keep the memory that it frees (`keep_freed_memory`); a bare loop, as anybody writes
it, leaves that to the C library. So the trainer, and the bare loop with its memory kept, are compared with the bare one
as it is; and the trainer with a bare loop that keeps its memory too: what the trainer adds to the same computation.

Each takes turns with the bare one within seconds, a few steps each, as the pace of a shared machine changes within
minutes: the ratio is the median over all turns of a turn's median step beside those of the two bare turns around it.
A turn is short, or its median would leave out the slow steps that a run has.
The first step of a turn does not count, nor do two epochs ahead of all, and the loader's process stands still while the
bare one runs.

A trainer's step lasts from one request for a batch to the next. What happens now and then is timed by itself and spread
over the recipe's period: a log line over 10 steps, a checkpoint's stall over 500, the probe over 5 % of 1,255 steps.
What the loader's process uses a batch is timed alone, in this process. Keep the machine idle.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import multiprocessing
import os
import resource
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from contrastive import builders
from contrastive.build import build_accelerator, build_data, build_model, build_trainer
from contrastive.config import Config, load_config
from contrastive.losses import InfoNCE
from contrastive.models import train_tokenizer
from contrastive.shards import loader, open_cache, open_index
from contrastive.training import adamw
from contrastive.training.memory import MMAP_THRESHOLD, TRIM_THRESHOLD, keep_freed_memory
from contrastive.training.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "step.json"
WARM = 6  # steps ahead of the first turn
EPOCH = 46  # twice as many with the loader: what it reads, maps and tokenises once is not of 27 epochs in 28
Found = dict[str, Any]
ONCE = 20  # steps of a short run
LOG_EVERY, SAVE_EVERY, PROBE_EVERY = 10, 500, 63


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=60, help="of each way")
    parser.add_argument("--steps", type=int, help="of a turn (default: 3); with --once: that count (default: 20)")
    parser.add_argument("--threads", type=int, help="that compute; default: torch's choice, one a core")
    parser.add_argument("--once", action="store_true", help="a few steps of the trainer on one batch")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
        loader.THREADS = arguments.threads
    with tempfile.TemporaryDirectory() as folder:
        if arguments.once:
            print(json.dumps(once(arguments.steps or ONCE, Path(folder))))
            return
        found = measure(arguments.turns, arguments.steps or 3, Path(folder))
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps(known | {f"{found['threads']} threads": found}, indent=1) + "\n")
    show(found)


def once(steps: int, folder: Path) -> dict[str, float]:
    """Median milliseconds of a step of the trainer on one batch that lies in memory."""
    setting = Setting(folder, WARM + steps + 2)
    resident = setting.driven("resident", setting.driven("trainer").items()[0])
    resident.steps = steps
    resident.trainer.fit(stop_after=resident.warm + steps + 1)
    return {"milliseconds a step": 1e3 * statistics.median(resident.turns[0][1:])}


class Setting:
    """The recipe, its data and its tokenizer, from which trainers are made. steps: that they may take."""

    def __init__(self, folder: Path, steps: int) -> None:
        lasting = [f"train.steps={steps}", "checkpoint.every=null", "eval.every=null", "eval.report=false"]
        recipe = ROOT / "recipes" / "pretrain" / "pictograms.yaml"
        self.config = load_config(recipe, [*lasting, f"track.log_every={LOG_EVERY}", f"track.probe_every={10**6}"])
        self.accelerator = build_accelerator(self.config)
        self.data = build_data(self.config)
        for part in self.data.parts:
            open_cache(part)
        self.tokenizer = train_tokenizer(self.data.captions(), 8000, True).to_str()
        self.folder = folder

    def driven(self, name: str, batch: Any = None) -> Driven:
        (self.folder / name).mkdir()
        run = self.config.run.model_copy(update={"dir": str(self.folder / name)})
        own = self.config.model_copy(update={"run": run})
        index = open_index(self.config.data.validation)
        model = build_model(own, self.tokenizer)
        made = build_trainer(own, self.accelerator, model, self.data, validation_index=index, quiet=True)
        return Driven(made, batch)


def measure(turns: int, steps: int, folder: Path) -> dict[str, Any]:
    """Each way beside the bare one. Times are in milliseconds."""
    builders.trainer.keep_freed_memory = lambda: None  # in the turns that want it
    setting = Setting(folder, 10 * (EPOCH + turns * steps))
    config, accelerator, tokenizer = setting.config, setting.accelerator, setting.tokenizer
    real = setting.driven("trainer")
    items = real.items()
    batch = items[0]
    resident = setting.driven("resident", batch)
    bare = Bare(config, accelerator, build_model(config, tokenizer), batch)
    bare.step()
    faults = {"untouched": statistics.median(bare.faults_of_steps(WARM))}
    ways = [
        ("bare, memory kept", "left", beside(bare.keeping, bare.leaving, turns, steps)),
        ("trainer", "left", real.beside(bare.leaving, turns, steps)),
    ]
    bare.seconds = {phase: [] for phase in bare.seconds}  # what is told of phases is with memory kept
    ways += [
        ("resident", "kept", resident.beside(bare.keeping, turns, steps)),
        ("trainer", "kept", real.beside(bare.keeping, turns, steps)),
    ]
    faults |= {"left": statistics.median(bare.faults["left"]), "kept": statistics.median(bare.faults["kept"])}
    periods = {"log line": LOG_EVERY, "checkpoint": SAVE_EVERY, "probe": PROBE_EVERY}
    now_and_then = {
        "log line": real.median("log"), "checkpoint": 1e3 * real.seconds["save"][0],
        "probe": timed(lambda: real.trainer.probe(real.trainer.train_step.two_tower), 3),
    }  # fmt: skip
    spread = sum(milliseconds / periods[name] for name, milliseconds in now_and_then.items())
    return {
        "threads": torch.get_num_threads(), "batch": config.train.global_batch, "turns": turns, "steps": steps,
        "precision": accelerator.mixed_precision, "faults": faults,
        "ways": [
            {"way": way, "beside": memory, **found, "overhead": found["ratio"] + more / found["bare"] - 1}
            for (way, memory, found), more in zip(ways, (0.0, spread, spread, spread), strict=True)
        ],
        "phases": {"bare": bare.phases(), "resident": resident.phases(), "trainer": real.phases()},
        "parts": {
            "waiting for the loader": real.median("data"),
            "agreeing": real.median("agree"),
            "gradient norm and clipping": real.median("clip"),
            "pixels to normalised floats (in bare too)": timed(lambda: normalise(bare.model, batch.pixels), 20),
        },
        "now and then": now_and_then, "spread": spread,
        "loader's own time": timed(lambda: items[1], 10, clock=time.process_time),
    }  # fmt: skip


def beside(way: Callable[[int], list[float]], bare: Callable[[int], list[float]], turns: int, steps: int) -> Found:
    """`turns` turns of a way between turns of a bare one."""
    found, around = [], [bare(steps)]
    for _ in range(turns):
        found.append(way(steps))
        around.append(bare(steps))
    return compared(found, around)


def compared(found: list[list[float]], around: list[list[float]]) -> Found:
    """Seconds of the steps of n turns, and of the n + 1 bare ones before, between and after them."""
    own, bare = ([statistics.median(turn[1:]) for turn in turns] for turns in (found, around))
    ratios = [2 * mine / (a + b) for mine, a, b in zip(own, bare[:-1], bare[1:], strict=True)]
    spread = statistics.quantiles(ratios, n=4)
    return {
        "ms": 1e3 * statistics.median(own), "bare": 1e3 * statistics.median(bare),
        "ratio": statistics.median(ratios), "quartiles": [spread[0], spread[2]],
    }  # fmt: skip


def timed(call: Callable[[], Any], times: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Median milliseconds of a call."""
    seconds = []
    for _ in range(times):
        started = clock()
        call()
        seconds.append(clock() - started)
    return 1e3 * statistics.median(seconds)


def normalise(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    floats = (pixels.float() - model.pixel_mean) / model.pixel_std
    return floats.contiguous(memory_format=torch.channels_last)


def leave_freed_memory() -> None:
    """glibc's thresholds as it raises them itself at most (mallopt(3)); it cannot be told to adapt again."""
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(MMAP_THRESHOLD, 32 << 20)
    mallopt(TRIM_THRESHOLD, 64 << 20)


class Bare:
    """The computation alone."""

    def __init__(self, config: Config, accelerator: Accelerator, model: Any, batch: Any) -> None:
        self.batch, self.loss = batch, InfoNCE(same_caption="ignore")
        optim = config.optim
        self.optimizer = adamw(model, lr=optim.lr, weight_decay=optim.weight_decay, betas=optim.betas, eps=optim.eps)
        self.model = accelerator.prepare(model.train())
        self.seconds: dict[str, list[float]] = {"forward": [], "loss": [], "backward": [], "optimizer": []}
        self.faults: dict[str, list[int]] = {"left": [], "kept": []}

    def leaving(self, steps: int) -> list[float]:
        """Seconds of so many steps whose freed memory is the C library's to keep or to give back."""
        leave_freed_memory()
        seconds = [self.step() for _ in range(steps)]
        self.faults["left"] += self.faults_of_steps(1)
        keep_freed_memory()  # what follows
        return seconds

    def keeping(self, steps: int) -> list[float]:
        """Of steps whose freed memory is kept."""
        if not keep_freed_memory():
            raise SystemExit("nothing to compare: this is not glibc, or the environment sets its malloc")
        seconds = [self.step() for _ in range(steps)]
        self.faults["kept"] += self.faults_of_steps(1)
        return seconds

    def faults_of_steps(self, steps: int) -> list[int]:
        counted = [resource.getrusage(resource.RUSAGE_SELF).ru_minflt]
        for _ in range(steps):
            self.step()
            counted.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
        return [after - before for before, after in itertools.pairwise(counted)]

    def step(self) -> float:
        marks = [time.perf_counter()]
        out = self.model(self.batch.pixels, self.batch.tokens)
        marks.append(time.perf_counter())
        loss = self.loss(out["image"], out["text"], out["scale"], ids=self.batch.ids)["loss"]
        marks.append(time.perf_counter())
        loss.backward()
        marks.append(time.perf_counter())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        marks.append(time.perf_counter())
        for name, begin, end in zip(self.seconds, marks, marks[1:], strict=False):
            self.seconds[name].append(end - begin)
        return marks[-1] - marks[0]

    def phases(self) -> dict[str, float]:
        return {name: 1e3 * statistics.median(seconds) for name, seconds in self.seconds.items()}


class Driven:
    """A trainer that gives way to the bare steps every few of its own; `batch` takes the place of its loader's."""

    def __init__(self, trainer: Trainer, batch: Any = None) -> None:
        self.trainer, self.batch = trainer, batch
        self.warm = 2 * EPOCH if batch is None else WARM
        self.between: Callable[[], None] = lambda: None  # a bare turn
        self.steps = 0  # of a turn
        self.turns: list[list[float]] = []
        self.seconds: dict[str, list[float]] = {name: [] for name in ("data", "agree", "clip", "log", "save")}
        self.of_phases: dict[str, list[float]] = {}
        self.shown = 0  # the step of the latest log line
        make, step = trainer.make_loader, trainer.train_step
        trainer.make_loader = lambda start, stage: _Noting(make(start, stage), self)
        trainer._agree = self.noting("agree", trainer._agree)  # type: ignore[method-assign]
        trainer._log = self.noting("log", trainer._log)  # type: ignore[method-assign]
        trainer._save = self.noting("save", trainer._save)  # type: ignore[method-assign]
        step.accelerator = _Clipping(step.accelerator, self)  # type: ignore[assignment]
        self._note_phases()

    def items(self) -> Any:
        """The batches of the recipe's loader."""
        return self.trainer.make_loader(0, self.trainer.curriculum.last).loader._items

    def beside(self, bare: Callable[[int], list[float]], turns: int, steps: int) -> Found:
        around: list[list[float]] = []

        def between() -> None:
            workers = [process.pid for process in multiprocessing.active_children() if process.pid]
            for worker in workers:
                os.kill(worker, signal.SIGSTOP)
            around.append(bare(steps))
            for worker in workers:
                os.kill(worker, signal.SIGCONT)

        self.between, self.steps, self.turns = between, steps, []
        self.trainer.fit(stop_after=self.trainer.step + self.warm + turns * steps + 1)
        return compared(self.turns[:turns], around[: turns + 1])

    def noting(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any) -> Any:
            started = time.perf_counter()
            try:
                return call(*arguments)
            finally:
                self.seconds[name].append(time.perf_counter() - started)

        return noted

    def _note_phases(self) -> None:
        """Milliseconds of each phase a step, from the trainer's own clock."""
        clock, plain = self.trainer.clock, self.trainer.clock.shares

        def shares() -> dict[str, float]:
            clock._add_up()
            steps, self.shown = self.trainer.step - self.shown, self.trainer.step
            for phase, seconds in clock._seconds.items():
                self.of_phases.setdefault(phase, []).append(1e3 * seconds / steps)
            return plain()

        clock.shares = shares  # type: ignore[method-assign]

    def median(self, name: str) -> float:
        return 1e3 * statistics.median(self.seconds[name])

    def phases(self) -> dict[str, float]:
        found = {phase: statistics.median(milliseconds) for phase, milliseconds in self.of_phases.items()}
        return found | {"data": self.median("data")}  # the clock's holds the bare turns too


class _Noting:
    def __init__(self, loader: Any, driven: Driven) -> None:
        self.loader, self.driven, self.identity = loader, driven, loader.identity

    def state(self, step: int) -> dict[str, Any]:
        return self.loader.state(step)

    def __iter__(self) -> Iterator[Any]:
        driven, fixed = self.driven, self.driven.batch
        batches = None if fixed is not None else iter(self.loader)
        started = 0.0
        try:
            for number in itertools.count():
                place = (number - driven.warm) % driven.steps
                now = time.perf_counter()
                if number > driven.warm:  # the step before ends here
                    driven.turns[-1].append(now - started)
                if number >= driven.warm and place == 0:
                    driven.between()
                    driven.turns.append([])
                started = time.perf_counter()
                batch = fixed if batches is None else next(batches)
                if number > driven.warm:
                    driven.seconds["data"].append(time.perf_counter() - started)
                yield batch
        finally:
            if batches is not None:
                batches.close()


class _Clipping:
    def __init__(self, accelerator: Accelerator, driven: Driven) -> None:
        self._accelerator = accelerator
        self.clip_grad_norm_ = driven.noting("clip", accelerator.clip_grad_norm_)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)


def show(found: dict[str, Any]) -> None:
    print(f"batch {found['batch']}, {found['precision']}, {found['threads']} threads")
    print("| way | bare's memory | a step, ms | bare beside it, ms | ratio | half of the turns | all in all |")
    print("|---|---|---|---|---|---|---|")
    for way in found["ways"]:
        low, high = way["quartiles"]
        print(f"| {way['way']} | {way['beside']} | {way['ms']:.0f} | {way['bare']:.0f} | ", end="")
        print(f"{way['ratio']:.3f} | {low:.2f} - {high:.2f} | {way['overhead']:+.1%} |")
    print(f"what happens now and then takes {found['spread']:.2f} ms a step")
    print("page faults of a bare step: " + ", ".join(f"{name} {count:,.0f}" for name, count in found["faults"].items()))
    for name, phases in found["phases"].items():
        print(f"{name:10} " + "  ".join(f"{phase} {milliseconds:.1f}" for phase, milliseconds in phases.items()))
    for name, milliseconds in {**found["parts"], **found["now and then"]}.items():
        print(f"{name:42} {milliseconds:8.2f} ms")
    print(f"{'the loader, processor time a batch':42} {found['loader' + chr(39) + 's own time']:8.2f} ms")


if __name__ == "__main__":
    main()

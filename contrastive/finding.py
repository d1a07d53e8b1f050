"""A learning rate and a chunk to start with: short trials of a recipe, of which nothing stays.

`find_rate` trains for some steps on the recipe's own data, `find_sizes` on random pixels; neither writes to the run
folder, and the weights are thrown away.
"""

from __future__ import annotations

import math
import multiprocessing
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from contrastive.build import build_accelerator, build_data, build_model, build_trainer, wants_training
from contrastive.config import Config
from contrastive.errors import UserError
from contrastive.losses import InfoNCE, fuse
from contrastive.preflight import check_losses, check_shards
from contrastive.pretrain import frozen_features, settle_tokenizer, teachers_of
from contrastive.training import adamw, check_chunkable
from contrastive.training.memory import end_above, peak_bytes, release_freed_memory, reset_peak
from contrastive.training.range_test import RangeTest, exponential_rates, range_test
from contrastive.training.step import TrainStep

SMALLEST = 8  # pairs of the first size that is tried
PLOTS = (".png", ".svg", ".pdf")
FULL = 77  # exit code of a process that took more memory than it may
AS_FAST = 0.95  # a larger size is preferred to one that is faster by less than this

_UNITS = {"B": 1, **{f"{p}B": 1000**n for n, p in enumerate("KMGT", 1)}}
_UNITS |= {f"{p}iB": 1024**n for n, p in enumerate("KMGT", 1)}


# ---- the learning rate


def find_rate(config: Config, *, low: float, high: float, steps: int) -> RangeTest:
    """Train the recipe's model on its data for `steps` steps, the rate growing from `low` to `high`; see `range_test`.

    The rate is `optim.lr`, constant but for its growth; `lr_scale` of the towers counts as in a run.

    Raises:
        UserError: the bounds or the number of steps make no sense; several processes; all that is wrong in the recipe.
    """
    if not 0 < low < high < math.inf:
        raise UserError(f"--from {low:g} --to {high:g}: give two rates, the first above 0 and below the second")
    if steps < 20:
        raise UserError(f"--steps {steps}: give at least 20; with fewer the loss says little")
    with _throwaway(config) as trial:
        accelerator = build_accelerator(trial)
        if accelerator.num_processes > 1:
            raise UserError(f"find: runs on one process, not on {accelerator.num_processes}; start it without torchrun")
        check_shards(trial)
        check_losses(trial)
        if trial.train.fused_loss:
            fuse()
        data = build_data(trial)
        model = build_model(trial, settle_tokenizer(trial, data, accelerator, None))
        trainer = build_trainer(
            trial,
            accelerator,
            model,
            data,
            features=frozen_features(config, model, data, accelerator) if trial.data.cache == "features" else None,
            teachers=teachers_of(config, data, accelerator),
            quiet=True,
        )
        trainer.model.train()
        torch.manual_seed(trial.run.seed + 1)
        batches = iter(trainer.make_loader(0, trainer.curriculum.last))

        def step(rate: float) -> float:
            metrics = trainer.train_step(next(batches), rate / trial.optim.lr)
            return math.inf if float(metrics["skipped"]) else float(metrics["loss"])

        try:
            return range_test(step, exponential_rates(low, high, steps))
        finally:
            getattr(batches, "close", lambda: None)()


@contextmanager
def _throwaway(config: Config) -> Iterator[Config]:
    """The recipe with a run folder that is gone behind the block, and without what only a whole run needs."""
    with tempfile.TemporaryDirectory(prefix="contrastive-find-") as folder:
        yield config.model_copy(
            update={
                "run": config.run.model_copy(update={"dir": folder}),
                "track": config.track.model_copy(update={"trackers": ()}),
                "optim": config.optim.model_copy(update={"ema": None}),
            }
        )


def rate_text(found: RangeTest, lr: float) -> str:
    """A table of some steps, and the rates to try."""
    shown = sorted({round(i * (len(found.rates) - 1) / 19) for i in range(20)})
    lines = [f"{'step':>6}  {'rate':>9}  {'loss':>9}"]
    lines += [f"{i + 1:6d}  {found.rates[i]:9.2e}  {found.smoothed[i]:9.4f}" for i in shown]
    if found.steepest is None:
        lines.append("the loss did not fall; begin the test at a lower rate (--from), or give it more --steps")
    else:
        lines.append(f"steepest descent    {found.steepest:.1e}")
    if found.diverged is None:
        lines.append(f"divergence          none up to {found.rates[-1]:.1e}; raise --to")
        lines.append(f"lowest loss         {found.lowest:.1e}; a tenth of it {found.lowest / 10:.1e}")
    else:
        lines.append(f"divergence began    {found.diverged:.1e}; a tenth of it {found.diverged / 10:.1e}")
    lines.append(f"the recipe has      optim.lr {lr:.1e}")
    return "\n".join(lines)


def plot_rates(found: RangeTest, path: Path) -> None:
    """Loss over rate, in the format that the name of the file says, one of `PLOTS`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    finite = [(rate, loss) for rate, loss in zip(found.rates, found.losses, strict=True) if loss < math.inf]
    axes.semilogx(*zip(*finite, strict=True), color="#b8bdc4", linewidth=0.8, label="loss of a step")
    axes.semilogx(found.rates, found.smoothed, color="#3b7dd8", label="running median")
    for rate, colour, label in (
        (found.steepest, "#3a9a6a", "steepest descent"),
        (found.diverged, "#c0504d", "divergence began"),
    ):
        if rate is not None:
            axes.axvline(rate, color=colour, linestyle=":", label=f"{label}, {rate:.1e}")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("loss")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


# ---- the size of a chunk


@dataclass(frozen=True)
class Size:
    """So many pairs went through a whole step at once: at what rate, and at what peak of memory; None: did not fit."""

    pairs: int
    rate: float | None
    peak: int | None


def parse_bytes(text: str) -> int:
    """``"4GiB"``, ``"800 MB"``, ``"1.5GiB"`` in bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B|B)?", text.strip())
    if not found or not float(found[1]):
        raise UserError(f"--memory {text}: expected a size such as 4GiB or 800MB")
    if found[2] is None:
        raise UserError(f"--memory {text}: of which unit? Write {text}GiB, {text}MB or {text}B")
    return round(float(found[1]) * _UNITS[found[2]])


def find_sizes(config: Config, *, memory: int | None, processes: int = 1, seconds: float = 1.0) -> Iterator[Size]:
    """Double the pairs that go through the towers at once, until they do not fit or are a process's whole batch.

    Each size is a whole step (both towers, InfoNCE of those pairs, backward, AdamW) on random pixels and captions of
    the full context, the longest there can be, in a child process. On a CPU its peak resident set counts, torch
    itself included; on a GPU what torch has taken there.

    Args:
        memory: bytes that the process may take; needed on a CPU. processes: among which the batch is divided.
        seconds: a size is measured for.

    Raises:
        UserError: no limit on a CPU; a recipe of features; the smallest size does not fit; the model cannot be built.
    """
    share = -(-config.train.global_batch // processes)
    if config.data.cache == "features":
        raise UserError("find batch: data.cache features runs the towers before training; there is no chunk to find")
    if memory is None and not torch.accelerator.is_available():
        raise UserError("find batch: a CPU has no limit of its own; say what a process may take, such as --memory 4GiB")
    ours, theirs = multiprocessing.get_context("spawn").Pipe(duplex=False)
    child = multiprocessing.get_context("spawn").Process(
        target=_measure, args=(config, _doubled(share), memory, seconds, theirs), name="find batch"
    )
    child.start()
    theirs.close()
    expected = iter(_doubled(share))
    try:
        while (told := _receive(ours)) is not None:
            if isinstance(told, str):
                raise UserError(told)
            next(expected)
            yield told
            if told.rate is None:
                break
        child.join()
        left = next(expected, None)
        if left is not None and child.exitcode in (FULL, -9):  # our own watch, or the system's
            yield Size(left, None, None)
        elif left is not None and child.exitcode:
            raise UserError(f"find batch: its process ended with code {child.exitcode} at {left} pairs, see above")
    finally:
        if child.is_alive():
            child.kill()
        child.join()


def _doubled(largest: int) -> list[int]:
    sizes = [SMALLEST * 2**n for n in range(32) if SMALLEST * 2**n < largest]
    return [*sizes, largest]


def _receive(connection: Any) -> Any:
    try:
        return connection.recv()
    except EOFError:
        return None


def _measure(config: Config, sizes: list[int], memory: int | None, seconds: float, connection: Any) -> None:
    """In the child: send a `Size` for each, or the text of an error."""
    try:
        with _throwaway(config) as trial:
            step, batch_of = _trial_step(trial)
            on_cpu = step.accelerator.device.type == "cpu"
            if on_cpu and memory is not None:
                end_above(memory, FULL)
            for pairs in sizes:
                found = _measure_one(step, batch_of(pairs), pairs, seconds)
                if memory is not None and found.peak is not None and found.peak > memory:
                    found = Size(pairs, None, None)
                connection.send(found)
                if found.rate is None:
                    break
    except UserError as error:
        connection.send(str(error))
    finally:
        connection.close()


def _trial_step(config: Config) -> tuple[TrainStep, Any]:
    """The step of a recipe with plain InfoNCE, and ``pairs -> a batch of as many``."""
    accelerator = build_accelerator(config)
    trained = ""
    if wants_training(config) is not None:
        check_shards(config)
        trained = settle_tokenizer(config, build_data(config), accelerator, None)
    model = build_model(config, trained).to(accelerator.device).train()
    optimizer = adamw(model, lr=1e-6, weight_decay=0.0, betas=config.optim.betas, eps=config.optim.eps)
    network, optimizer = accelerator.prepare(model, optimizer)
    generator = torch.Generator().manual_seed(config.run.seed)

    def batch_of(pairs: int) -> Any:
        shape = (pairs, 3, model.image_size, model.image_size)
        tokens = torch.randint(1, model.tokenizer.vocab_size, (pairs, model.tokenizer.context), generator=generator)
        return SimpleNamespace(
            pixels=torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8),
            tokens=tokens,
            ids=torch.arange(pairs),
            valid=torch.ones(pairs, dtype=torch.bool),
        )

    return TrainStep(accelerator, network, InfoNCE(), optimizer, clip=config.optim.clip), batch_of


def _measure_one(step: TrainStep, batch: Any, pairs: int, seconds: float) -> Size:
    device = step.accelerator.device
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        release_freed_memory()  # of the size before, which no run of this one has
    reset_peak()
    try:
        step(batch, 1.0)  # makes the optimizer's state, and whatever else a first step makes
        done, started = 0, time.perf_counter()
        while not done or time.perf_counter() - started < seconds:
            float(step(batch, 1.0)["loss"])  # waits for the device
            done += pairs
        passed = time.perf_counter() - started
    except torch.OutOfMemoryError:
        return Size(pairs, None, None)
    except RuntimeError as error:
        if "allocate memory" not in str(error):  # the CPU's allocator has no class of its own
            raise
        return Size(pairs, None, None)
    return Size(pairs, done / passed, torch.cuda.max_memory_allocated(device) if on_cuda else peak_bytes())


def suggested_chunk(sizes: list[Size], batch: int) -> int | None:
    """`train.chunk`: None where a process's whole `batch` fits, else the largest size that is about as fast as any."""
    fitting = [(size.pairs, size.rate) for size in sizes if size.rate is not None]
    if fitting[-1][0] >= batch:
        return None
    fastest = max(rate for _, rate in fitting)
    return max(pairs for pairs, rate in fitting if rate >= AS_FAST * fastest)


def sizes_text(config: Config, sizes: list[Size], processes: int) -> str:
    """What to write into the recipe.

    Raises:
        UserError: not even the first size fitted.
    """
    batch = -(-config.train.global_batch // processes)
    if sizes[0].rate is None:
        raise UserError(f"find batch: not even {sizes[0].pairs} pairs fit; give it more memory, or a smaller model")
    chunk, largest = suggested_chunk(sizes, batch), max(size.pairs for size in sizes if size.rate is not None)
    if chunk is None:
        return f"train.chunk: null: the whole batch of {batch} pairs a process fits"
    try:
        check_chunkable(build_model(config, _small_tokenizer(config)).train(), chunk)
    except UserError:
        return (
            f"train.global_batch: {largest * processes} at most: this model takes batch statistics, so that no chunk "
            "can stand for a batch"
        )
    return f"train.chunk: {chunk}"


def _small_tokenizer(config: Config) -> str:
    """Some tokenizer, where the recipe trains one: for looks at the model that do not depend on its table."""
    from contrastive.models import train_tokenizer

    choice = wants_training(config)
    return "" if choice is None else train_tokenizer(["a"], choice.vocab_size, choice.lowercase).to_str()

"""The loop. One step is in ``step.py``; this file decides when to log, validate, save and stop."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.optim import Optimizer

from contrastive.errors import UserError
from contrastive.training.checkpoint import load_checkpoint, save_checkpoint
from contrastive.training.progress import Progress
from contrastive.training.schedule import Duration, Schedule
from contrastive.training.skips import Skips
from contrastive.training.step import LossFunction, TrainStep
from contrastive.training.tracking import Tracker

Validate = Callable[[Any], dict[str, float]]


class Loader(Protocol):
    """See `Trainer`."""

    identity: dict[str, Any]

    def state(self, step: int) -> dict[str, Any]: ...

    def __iter__(self) -> Iterator[Any]: ...


class NonFinite(UserError):
    """The loss or a weight became infinite or not a number; no checkpoint holds such a weight."""


class Trainer:
    """Trains a two-tower model until its duration is over, it is told to stop, or the loss is no number.

    Every rank runs the same steps. What must be decided alike (stop? did a loader fail? is too much of the data bad?)
    is agreed in one small all-reduce a step, behind the loader and before the towers: no rank enters a collective that
    another will not reach. A run of so many minutes agrees on the time in a second one.

    Args:
        make_loader: ``start_step -> iterable of batches``; batches are a pure function of the step. It has
            ``identity``, JSON that is equal for equal streams, and ``state(step)``, see `PairLoader`.
        skips: counts what the loader leaves out, and stops the run when that is too much.
        chunk: rows that a process puts through the towers at once, see `TrainStep`.
        identity: what a checkpoint must have in common with this run to be resumed (JSON).
        validate: ``two-tower model -> {name: share of 1}``, called on the main process every `validate_every` (a
            number of steps, or a share of the run between 0 and 1; None for never).
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        loss: LossFunction,
        optimizer: Optimizer,
        schedule: Schedule,
        duration: Duration,
        make_loader: Callable[[int], Loader],
        skips: Skips,
        *,
        run_dir: Path,
        global_batch: int,
        identity: dict[str, Any],
        clip: float | None = 1.0,
        chunk: int | None = None,
        checkpoint_every: int | None = None,
        keep: int = 2,
        validate: Validate | None = None,
        validate_every: int | float | None = None,
        log_every: int = 10,
        quiet: bool = False,
    ) -> None:
        self.accelerator, self.schedule, self.duration = accelerator, schedule, duration
        self.make_loader, self.skips = make_loader, skips
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        # A loss may keep something from step to step (a module with buffers): it is on the device and in checkpoints.
        self.loss = loss.to(accelerator.device).train() if isinstance(loss, nn.Module) else None
        self.train_step = TrainStep(accelerator, self.model, loss, self.optimizer, clip=clip, chunk=chunk)
        self.run_dir, self.global_batch = run_dir, global_batch
        self._loader = make_loader(0)  # what is wrong with it is told before the first step
        self.identity = {**identity, "loader": self._loader.identity}
        self.checkpoint_every, self.keep = checkpoint_every, keep
        self.validate, self.validate_every = validate, validate_every
        self.log_every = log_every
        self.quiet = quiet
        self.step = 0  # optimizer steps done: the whole position in the data
        self.seconds = 0.0  # training time, validation and saving left out
        self._saved_step = 0

    # ---- the loop

    def fit(self, resume_from: Path | None = None, stop_after: int | None = None) -> bool:
        """Run to the end, or to step `stop_after`; a checkpoint is saved there either way.

        Returns:
            True when the run is complete, False when it was stopped early (`stop_after` or a signal).

        Raises:
            UserError: a loader failed or too much of the data is bad, behind a checkpoint to go on from; the loss or
                a weight is not finite. Every rank raises at the same step.
        """
        self.model.train()
        if resume_from is not None:
            self._restore(resume_from)
        self._loader = self.make_loader(self.step)
        batches = iter(self._loader)
        tracker = Tracker(self.accelerator, self.run_dir, from_step=self.step)
        progress = Progress(enabled=self.accelerator.is_main_process and not self.quiet)
        window = _Window()
        share = self.duration.progress(self.step, self.seconds)
        stopping = False
        with _stop_on_signal() as stop_requested, _closing(batches):
            # A step lasts from one turn of the loop to the next: an accelerator works on after the call returns, and
            # whoever waits for it first pays. Saving and validation are left out by starting the clock anew.
            started = time.perf_counter()
            while share < 1.0 and not stopping:
                waiting = time.perf_counter()
                batch, fault = _fetch(batches)
                wait = time.perf_counter() - waiting
                stopping = self._agree(stop_requested.is_set(), batch, fault)
                factor = self.schedule.factor(self.step, share)
                metrics = self.train_step(batch, factor)
                self.step += 1
                before, now = share, time.perf_counter()
                seconds, started = now - started, now
                self.seconds += self._slowest(seconds)
                share = self.duration.progress(self.step, self.seconds)
                stopping = stopping or self.step == stop_after
                window.add(metrics, wait, seconds, factor)
                if self.step % self.log_every == 0 or share >= 1.0 or stopping:
                    self._log(window, tracker, progress, share)
                    window = _Window()
                last = share >= 1.0 or stopping
                if last or (self.checkpoint_every and self.step % self.checkpoint_every == 0):
                    self._save()
                    started = time.perf_counter()
                if self._validation_due(before, share):
                    self._validate(tracker, progress)
                    started = time.perf_counter()
        progress.close()
        return share >= 1.0

    def _agree(self, stop: bool, batch: Any, fault: Exception | None) -> bool:
        """Whether to stop behind this step; every rank decides alike, from what the loaders of all of them gave.

        Raises:
            UserError: see `fit`; a rank whose own loader raised `fault` raises that.
        """
        failed = self.skips.failed if fault is None else str(fault) or type(fault).__name__
        own = (stop, [] if batch is None else batch.rejected, failed)
        everyones = [own]
        if self.accelerator.num_processes > 1:
            remarkable = torch.tensor([float(any(own))], device=self.accelerator.device)
            everyones *= self.accelerator.num_processes
            if float(self.accelerator.reduce(remarkable, reduction="sum")) > 0:  # seldom: objects are slow to pass on
                everyones = gather_object([own])
        faults = [failed for _, _, failed in everyones if failed is not None]
        try:
            if fault is not None:
                raise fault
            if faults:
                raise UserError(faults[0])
            self.skips.add(self.step + 1, [one for _, rejected, _ in everyones for one in rejected])
        except Exception as error:
            if self.step > self._saved_step:
                self._save()
            if self.step and isinstance(error, UserError):
                raise type(error)(f"{error}. With --resume the run goes on from step {self.step}") from None
            raise
        return any(stop for stop, _, _ in everyones)

    def _slowest(self, seconds: float) -> float:
        """The time of a step, on every rank alike where the end of the run depends on it."""
        if self.accelerator.num_processes == 1 or self.duration.minutes is None:
            return seconds
        own = torch.tensor([seconds], device=self.accelerator.device)
        return float(self.accelerator.gather(own).max())

    # ---- what happens now and then

    def _log(self, window: _Window, tracker: Tracker, progress: Progress, share: float) -> None:
        values = window.means()
        if self.accelerator.num_processes > 1:  # every rank holds the loss of its own rows
            keys = sorted(values)
            stacked = torch.tensor([values[k] for k in keys], device=self.accelerator.device, dtype=torch.float64)
            mean = self.accelerator.reduce(stacked, reduction="mean")
            values = dict(zip(keys, mean.tolist(), strict=True))
        rate = window.steps * self.global_batch / window.step_seconds
        wait = window.wait_seconds / window.step_seconds
        row = {f"train/{key}": value for key, value in values.items()}
        row |= {"train/lr_factor": window.lr_factor, "train/pairs_per_second": rate, "train/data_wait": wait}
        row |= {"train/samples": float(self.step * self.global_batch), "train/seconds": self.seconds}
        row |= {f"train/rejected_{reason.replace(' ', '_')}": float(n) for reason, n in self.skips.counts.items()}
        tracker.log(self.step, row)
        progress.update(self.step, share, self.seconds, rate, wait, values["loss"])
        if not math.isfinite(values["loss"]):
            raise NonFinite(
                f"the loss is {values['loss']} at step {self.step}; lower optim.lr or raise optim.warmup, and go on "
                "from the newest checkpoint with --resume"
            )

    def _validation_due(self, before: float, now: float) -> bool:
        if self.validate is None or now >= 1.0 or not self.validate_every:
            return False  # the last validation is the caller's: it wants more than scalars
        if isinstance(self.validate_every, int):
            return self.step % self.validate_every == 0
        return math.floor(now / self.validate_every + 1e-9) > math.floor(before / self.validate_every + 1e-9)

    def _validate(self, tracker: Tracker, progress: Progress) -> None:
        assert self.validate is not None
        if self.accelerator.is_main_process:
            # Validation must not move the random streams: resuming behind it would give other weights.
            own = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
            with torch.random.fork_rng(devices=own):
                two_tower: Any = self.accelerator.unwrap_model(self.model)
                values = self.validate(two_tower)
                two_tower.train()
            tracker.log(self.step, {f"validation/{key}": value for key, value in values.items()})
            progress.write(
                f"validation at step {self.step}: " + " · ".join(f"{key} {value:.1%}" for key, value in values.items())
            )
        self.accelerator.wait_for_everyone()

    def _save(self) -> None:
        # A finite loss does not vouch for the step behind it. Ranks hold the same weights, so they decide alike.
        if not all(bool(parameter.isfinite().all()) for parameter in self.model.parameters()):
            raise NonFinite(
                f"a weight is not finite after step {self.step}; nothing was saved. Lower optim.lr or set optim.clip, "
                "and go on from the newest checkpoint with --resume"
            )
        loader = {**self._loader.state(self.step), "counters": self.skips.state()}
        state = {"step": self.step, "seconds": self.seconds, **self.identity, "loader": loader}
        folder = self.run_dir / "checkpoints"
        save_checkpoint(folder, self.accelerator, self.model, self.optimizer, state, loss=self.loss, keep=self.keep)
        self._saved_step = self.step

    def _restore(self, path: Path) -> None:
        state = load_checkpoint(path, self.accelerator, self.model, self.optimizer, self.identity, loss=self.loss)
        self.step, self.seconds = state["step"], state["seconds"]
        self.skips.restore(state["loader"]["counters"])
        self._saved_step = self.step


def _fetch(batches: Iterator[Any]) -> tuple[Any, Exception | None]:
    """The next batch, or the error in its place: a rank that raised it at once would leave the others waiting."""
    try:
        return next(batches), None
    except Exception as error:
        return None, error


class _Window:
    """Sums since the last log line; tensors stay on the device until `means`, so that no step waits for it."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.steps = 0
        self.wait_seconds = self.step_seconds = self.lr_factor = 0.0

    def add(self, metrics: dict[str, torch.Tensor], wait: float, seconds: float, factor: float) -> None:
        for key, value in metrics.items():
            self.sums[key] = self.sums[key] + value.float() if key in self.sums else value.float()
        self.steps += 1
        self.wait_seconds += wait
        self.step_seconds += seconds
        self.lr_factor = factor

    def means(self) -> dict[str, float]:
        return {key: float(value) / self.steps for key, value in self.sums.items()}


@contextmanager
def _closing(loader: Any) -> Any:
    """End the loader's workers however the loop ends: they ignore the signal by which Python ends them at exit."""
    try:
        yield
    finally:
        getattr(loader, "close", lambda: None)()


@contextmanager
def _stop_on_signal() -> Any:
    """An event that SIGINT or SIGTERM sets: the run saves at the next step boundary and stops."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def request(number: int, frame: Any) -> None:
        if event.is_set() and number == signal.SIGINT:  # the second Ctrl-C means now
            raise KeyboardInterrupt
        event.set()

    for number in before:
        signal.signal(number, request)
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

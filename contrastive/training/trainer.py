"""The loop. One step is in ``step.py``; this file decides when to log, validate, save and stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.optim import Optimizer

from contrastive.errors import UserError
from contrastive.losses.waiting import watch_exchanges
from contrastive.run_folder import RunFolder
from contrastive.training.checkpoint import load_checkpoint, set_aside, take_snapshot
from contrastive.training.clock import Clock, time_averaging
from contrastive.training.curriculum import Curriculum, Settings, StagedBatches
from contrastive.training.ema import WeightAverage
from contrastive.training.faults import Watchdog, stop_on_signal
from contrastive.training.final import FinalModel, take_final_weights
from contrastive.training.hold import Hold
from contrastive.training.patience import EarlyStop
from contrastive.training.probe_batch import ProbeBatch
from contrastive.training.progress import Progress
from contrastive.training.rates import Rates
from contrastive.training.saver import Saver
from contrastive.training.schedule import Duration, Every, Point, Schedule
from contrastive.training.sharding import drain, fill, is_sharded
from contrastive.training.skips import Skips
from contrastive.training.step import LossFunction, TrainStep
from contrastive.training.tracking import Tracker
from contrastive.training.utilisation import Utilisation

Validate = Callable[[Any], dict[str, float]]


class Loader(Protocol):
    """See `Trainer`."""

    identity: dict[str, Any]

    def state(self, step: int) -> dict[str, Any]: ...

    def __iter__(self) -> Iterator[Any]: ...


class NonFinite(UserError):
    """Gradients or a loss became infinite or not a number."""


class Trainer:
    """Trains a two-tower model until its duration is over, it is told to stop, or its gradients are no numbers.

    Every rank runs the same steps. What must be decided alike (stop? did a loader fail? is too much of the data bad?)
    is agreed in one small all-reduce a step, behind the loader and before the towers: no rank enters a collective that
    another will not reach. A run of so many minutes agrees on the time in a second one.

    Args:
        make_loader: ``(start_step, settings) -> iterable of batches``; batches are a pure function of the step and the
            settings of its stage, and their samples of the step alone. It has ``identity``, JSON that is equal for
            equal streams, and ``state(step)``, see `PairLoader`.
        skips: counts what the loader leaves out, and stops the run when that is too much.
        chunk: rows that a process puts through the towers at once, see `TrainStep`.
        unfreeze_at: by tower, until where its trunk is locked, see `Hold`.
        identity: what a checkpoint must have in common with this run to be resumed (JSON).
        curriculum: the settings of its stages; None for a run that is the same throughout.
        checkpoint_every: None saves at the end only. Checkpoints are written in the background; the newest `keep` stay,
            and those of every `keep_every` steps, and the one with the largest value of `keep_best`, a name that
            `validate` returns (it is saved behind the validation).
        max_skipped: so many steps in a row without a finite gradient stop the run.
        step_timeout: seconds after which a step that does not end ends the process, see `Watchdog`.
        validate: ``two-tower model -> {name: share of 1}``, called on the main process every `validate_every`.
        probe: is called on the main process every `probe_every`. mfu: log what `Utilisation` gives.
        ema: ``(decay, every)`` of a `WeightAverage`, validated and final; the main process has it.
        stop: ends the run behind a validation; its metric is a name that `validate` returns.
        rates: saved in checkpoints, so that a resumed run can report where its learning rate changes.
        twin: of a sharded model, on the main process: one like it that takes the whole weights to be evaluated.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        loss: LossFunction,
        optimizer: Optimizer,
        schedule: Schedule,
        duration: Duration,
        make_loader: Callable[[int, Settings], Loader],
        skips: Skips,
        *,
        run_dir: Path,
        global_batch: int,
        identity: dict[str, Any],
        curriculum: Curriculum | None = None,
        clip: float | None = 1.0,
        chunk: int | None = None,
        unfreeze_at: Mapping[str, Point] | None = None,
        checkpoint_every: Every | None = None,
        keep: int = 2,
        keep_every: int | None = None,
        keep_best: str | None = None,
        max_skipped: int = 20,
        step_timeout: float | None = None,
        validate: Validate | None = None,
        validate_every: Every | None = None,
        probe: ProbeBatch | None = None,
        probe_every: Every | None = None,
        mfu: bool = False,
        log_every: int = 10,
        quiet: bool = False,
        ema: tuple[float, int] | None = None,
        stop: EarlyStop | None = None,
        rates: Rates | None = None,
        twin: nn.Module | None = None,
    ) -> None:
        self.accelerator, self.schedule, self.duration = accelerator, schedule, duration
        self.make_loader, self.skips = make_loader, skips
        if is_sharded(model):  # it averages gradients itself
            self.model, self.optimizer = model, accelerator.prepare_optimizer(optimizer)
        else:
            self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.twin = twin
        # A loss may keep something from step to step (a module with buffers): it is on the device and in checkpoints.
        self.loss = loss.to(accelerator.device).train() if isinstance(loss, nn.Module) else None
        self.hold = Hold(self.model, accelerator.unwrap_model(self.model), unfreeze_at or {})
        self.clock = Clock(accelerator.device)
        time_averaging(self.model, self.clock)
        self.train_step = TrainStep(
            accelerator, self.model, loss, self.optimizer,
            clip=clip, chunk=chunk, hold=self.hold, clock=self.clock, before_update=self._let_copy,
        )  # fmt: skip
        averages = ema is not None and accelerator.is_main_process
        self.average = WeightAverage(accelerator.unwrap_model(self.model), *ema) if averages and ema else None
        self.stop = stop
        self.rates = rates or Rates()
        self.run_dir, self.global_batch = run_dir, global_batch
        self.curriculum = curriculum or Curriculum()
        # What is wrong with it is told before the first step. Of a run in stages it is the last one's.
        self._loader = make_loader(0, self.curriculum.last)
        self.identity = {**identity, "loader": self._loader.identity}
        self.checkpoint_every, self.keep_best = checkpoint_every, keep_best
        self.saver = Saver(RunFolder(run_dir).checkpoints, keep=keep, keep_every=keep_every)
        self.max_skipped, self.step_timeout = max_skipped, step_timeout
        self.validate, self.validate_every = validate, validate_every
        self.probe, self.probe_every = probe, probe_every
        self.mfu = mfu
        self._utilisation: Utilisation | None = None
        self.log_every = log_every
        self.quiet = quiet
        self.step = 0  # optimizer steps done: the whole position in the data
        self.seconds = 0.0  # training time, validation and saving left out
        self._stalled = 0.0  # of the step at hand, which waited for a copy
        self.final: Any = None  # behind `fit`, on the main process: the model with all its weights
        self._validation_due = False  # behind this step, and not done yet
        self._saved_step = 0  # of the newest snapshot; the saver's is that of the newest on the disk
        self.skipped = self._skipped_in_a_row = 0  # steps whose gradients were not finite

    # ---- the loop

    def fit(self, resume_from: Path | None = None, stop_after: int | None = None) -> bool:
        """Run to the end, or to step `stop_after`; a checkpoint is saved there either way.

        Returns:
            True when the run is complete, as one is that `stop` ended; False when it was stopped before (`stop_after`
            or a signal).

        Raises:
            UserError: a loader failed or too much of the data is bad, behind a checkpoint to go on from; a checkpoint
                cannot be written; a weight, or the gradients of too many steps in a row, are not finite. Every rank
                raises at the same step.
        """
        self.model.train()
        if resume_from is not None:
            self._restore(resume_from)
        if self.mfu:  # ahead of the loader's workers, which would take part of the machine
            self._utilisation = Utilisation(self.accelerator)
        tracker = Tracker(self.accelerator, self.run_dir, from_step=self.step, validates_first=self._validation_due)
        progress = Progress(enabled=self.accelerator.is_main_process and not self.quiet)
        two_tower: Any = self.accelerator.unwrap_model(self.model)
        batches = StagedBatches(
            self.curriculum, self.make_loader, lambda rate: two_tower.set_patch_dropout(rate), progress.write
        )
        window = _Window()
        share = self.duration.progress(self.step, self.seconds)
        exchanges = watch_exchanges(lambda: self.clock.within("communication"))
        with stop_on_signal() as stop_requested, self._watchdog() as watchdog, _closing(batches, self.saver), exchanges:
            if self._validation_due:  # of a run that was stopped before it
                self._validate(tracker, progress)
            stopping = self.stopped_early
            # A step lasts from one turn of the loop to the next: an accelerator works on after the call returns, and
            # whoever waits for it first pays. Saving and validation are left out by starting the clock anew.
            started = time.perf_counter()
            self.clock.start()
            while share < 1.0 and not stopping:
                watchdog.watch()
                waiting = time.perf_counter()
                with self.clock.within("data"):
                    batch, fault = batches.fetch(self.step, share)
                wait = time.perf_counter() - waiting
                stopping = self._agree(stop_requested.is_set(), batch, fault)
                if self._utilisation is not None:
                    self._utilisation.count(self.train_step.two_tower, batch)
                factor = self.schedule.factor(self.step, share)
                self.hold.move_to(self.step, share)
                metrics = self.train_step(batch, factor)
                skipped = float(metrics["skipped"]) > 0
                if self.average is not None and not skipped:
                    self.average.update()
                self.step += 1
                before, now = (self.step - 1, self.seconds, share), time.perf_counter()
                seconds, started = now - started - self._stalled, now
                self._stalled = 0.0
                self.seconds += self._slowest(seconds)
                share = self.duration.progress(self.step, self.seconds)
                place = (self.step, self.seconds, share)
                stopping = stopping or self.step == stop_after
                self._count_skipped(skipped)
                window.add(metrics, wait, seconds, factor)
                watchdog.rest()  # logging may pass through a slow tracker, saving and validation take their time
                probed = self._probe(before, place)
                if self.step % self.log_every == 0 or share >= 1.0 or stopping:
                    self._log(window, tracker, progress, share, probed)
                    window = _Window()
                elif probed:
                    tracker.log(self.step, probed)
                last = share >= 1.0 or stopping
                # the last validation is the caller's: it wants more than scalars
                self._validation_due = share < 1.0 and self._is_time_to_validate(before, place)
                if last or (self.checkpoint_every and self.checkpoint_every.due(before, place)):
                    with self.clock.within("saving"):
                        self._save()
                    started = time.perf_counter()
                if self._validation_due and not stopping:  # a scheduler that stops a run does not wait for it
                    with self.clock.within("validation"):
                        self._validate(tracker, progress)
                    stopping = self.stopped_early
                    started = time.perf_counter()
        progress.close()
        self._finish_saving()
        self.final = self._whole()
        return share >= 1.0 or self.stopped_early

    @property
    def stopped_early(self) -> bool:
        """Whether the validations have ended the run."""
        return self.stop is not None and self.stop.stopped

    def take_final_weights(self) -> FinalModel:
        """Put the weights that the run ends with into the model of the main process, see there; behind `fit`."""
        watched = None if self.stop is None else self.stop.metric
        best = self.saver.best if self.stopped_early and self.keep_best == watched else None
        reason = self.stop.reason if self.stop is not None and self.stopped_early else None
        return take_final_weights(self.final, self.average, self.step, self.saver.folder, best=best, reason=reason)

    def _is_time_to_validate(self, before: tuple[int, float, float], now: tuple[int, float, float]) -> bool:
        return bool(self.validate and self.validate_every and self.validate_every.due(before, now))

    def _agree(self, stop: bool, batch: Any, fault: Exception | None) -> bool:
        """Whether to stop behind this step; every rank decides alike, from what the loaders of all of them gave.

        Raises:
            UserError: see `fit`; a rank whose own loader raised `fault` raises that.
        """
        failed = None if self.skips.failed is None else UserError(self.skips.failed)
        if fault is not None:  # a UserError keeps its class on the other ranks: of a Fault the exit code is 1 on all
            failed = fault if isinstance(fault, UserError) else UserError(str(fault) or type(fault).__name__)
        own = (stop, [] if batch is None else batch.rejected, failed, self.saver.failed)
        everyones = [own]
        if self.accelerator.num_processes > 1:
            remarkable = torch.tensor([float(any(own))], device=self.accelerator.device)
            everyones *= self.accelerator.num_processes
            with self.clock.within("communication"):
                if float(self.accelerator.reduce(remarkable, reduction="sum")) > 0:
                    # seldom: objects are slow to pass on
                    everyones = gather_object([own])
        unsaved = [unsaved for _, _, _, unsaved in everyones if unsaved is not None]
        faults = [failed for _, _, failed, _ in everyones if failed is not None]
        try:
            if unsaved:
                raise UserError(unsaved[0])
            if fault is not None:
                raise fault
            if faults:
                raise faults[0]
            self.skips.add(self.step + 1, [one for _, rejected, _, _ in everyones for one in rejected])
        except Exception as error:
            if unsaved:
                raise
            if self.step > self._saved_step:
                self._save()
            self._finish_saving()  # or what follows may promise a checkpoint that was never whole
            if self.step and isinstance(error, UserError):
                raise type(error)(f"{error}. With --resume the run goes on from step {self.step}") from None
            raise
        return any(stop for stop, _, _, _ in everyones)

    def _slowest(self, seconds: float) -> float:
        """The time of a step, on every rank alike where something depends on it."""
        clocks = [every for every in (self.checkpoint_every, self.validate_every) if every and every.seconds]
        if self.accelerator.num_processes == 1 or (self.duration.minutes is None and not clocks):
            return seconds
        own = torch.tensor([seconds], device=self.accelerator.device)
        with self.clock.within("communication"):
            return float(self.accelerator.gather(own).max())

    def _count_skipped(self, skipped: bool) -> None:
        self.skipped += skipped
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        if self._skipped_in_a_row >= self.max_skipped:
            raise NonFinite(
                f"the gradients of {self._skipped_in_a_row} steps in a row, up to step {self.step}, were not finite "
                "(no weight was changed); lower optim.lr or raise optim.warmup, and go on from the newest "
                "checkpoint with --resume"
            )

    # ---- what happens now and then

    def _log(
        self, window: _Window, tracker: Tracker, progress: Progress, share: float, probed: dict[str, float]
    ) -> None:
        values = window.means() | {f"time_{phase}": share for phase, share in self.clock.shares().items()}
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
        row["train/skipped_steps"] = float(self.skipped)
        if self._utilisation is not None:
            row |= self._utilisation.row(rate)
        tracker.log(self.step, row | probed)
        progress.update(self.step, share, self.seconds, rate, wait, values.get("loss", math.nan))
        if not math.isfinite(values.get("loss", 0.0)):  # with gradients that are
            raise NonFinite(
                f"the loss is {values['loss']} at step {self.step}; lower optim.lr or raise optim.warmup, and go on "
                "from the newest checkpoint with --resume"
            )

    def _probe(self, before: tuple[int, float, float], place: tuple[int, float, float]) -> dict[str, float]:
        """The probe where it is due. Other processes, which have none, go on and wait at the next collective."""
        if self.probe_every is None or not self.probe_every.due(before, place):
            return {}
        with self.clock.within("validation"):
            whole = self._whole()
            return {} if self.probe is None else self.probe(whole)

    def _validate(self, tracker: Tracker, progress: Progress) -> None:
        assert self.validate is not None
        self._finish_saving()  # a weight that is not finite is told here, not as what validation makes of it
        whole = self._whole()
        better, fault, watched = False, None, math.nan
        if self.accelerator.is_main_process:
            # Validation must not move the random streams: resuming behind it would give other weights.
            own = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
            averaged = nullcontext() if self.average is None else self.average.applied()
            with torch.random.fork_rng(devices=own), averaged:
                values = self.validate(whole)
                whole.train()
            tracker.log(self.step, {f"validation/{key}": value for key, value in values.items()})
            progress.write(
                f"validation at step {self.step}: " + " · ".join(f"{key} {value:.1%}" for key, value in values.items())
            )
            for key, name in (("checkpoint.keep_best", self.keep_best), ("eval.stop.metric", self._watched)):
                if name is not None and name not in values:
                    fault = f"{key}: {name!r}; validation gives {', '.join(sorted(values))}"
            if fault is None and self.keep_best is not None:
                better = self.saver.score(self.step, values[self.keep_best])
            watched = values.get(self._watched or "", math.nan)
        # the others wait here for the main process
        better, fault, watched = gather_object([(better, fault, watched)])[0]
        if fault is not None:
            raise UserError(fault)
        self._validation_due = False
        if self.stop is not None:
            self.stop.observe(self.step, watched)
            if self.stopped_early:
                progress.write(f"stopped early at step {self.step}: {self.stop.reason}")
        if (better or self.stopped_early) and self.step != self._saved_step:
            with self.clock.within("saving"):
                self._save()

    @property
    def _watched(self) -> str | None:
        return None if self.stop is None else self.stop.metric

    def _save(self) -> None:
        """Begin to save; `_finish_saving` waits for the end."""
        loader = {**self._loader.state(self.step), "counters": self.skips.state()}
        skipped = {"skipped": self.skipped, "skipped_in_a_row": self._skipped_in_a_row}
        state = {"step": self.step, "seconds": self.seconds, **skipped, **self.identity, "loader": loader}
        state |= {"validation_due": self._validation_due, "stop": None if self.stop is None else self.stop.state()}
        state |= {"rates": self.rates.state(self._next_factor())}
        self.saver.finish()
        spare = self.saver.spare
        snapshot = take_snapshot(
            self.accelerator, self.model, self.optimizer, self.loss, state, spare, average=self.average
        )
        if self.accelerator.is_main_process:
            self.saver.save(snapshot)
        self._saved_step = self.step

    def _next_factor(self) -> float:
        return self.schedule.factor(self.step, self.duration.progress(self.step, self.seconds))

    def _let_copy(self) -> None:
        """Weights and moments change from here on: a snapshot of them must be taken."""
        if self.saver.reads_the_run:
            started = time.perf_counter()
            with self.clock.within("saving"):
                self.saver.wait_until_copied()
            self._stalled = time.perf_counter() - started

    def _finish_saving(self) -> None:
        """Wait for the disk; raises UserError on every rank where it failed."""
        self.saver.finish()
        for fault in gather_object([self.saver.failed]):
            if fault is not None:
                raise UserError(fault)

    def _restore(self, path: Path) -> None:
        state = load_checkpoint(
            path, self.accelerator, self.model, self.optimizer, self.identity, loss=self.loss, average=self.average
        )
        self.step, self.seconds = state["step"], state["seconds"]
        self.skipped, self._skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
        change = self.rates.change(self.step, state.get("rates"), self._next_factor())
        if change is not None:
            self.accelerator.print(change, flush=True)
        self.skips.restore(state["loader"]["counters"])
        self._validation_due = bool(state.get("validation_due") and self.validate and self.validate_every)
        if self.stop is not None:
            self.stop.restore(state.get("stop"))
        self._saved_step = self.step
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            set_aside(self.saver.folder, beyond=self.step)

    def _whole(self) -> Any:
        """The model with all its weights, on the main process; all of them call it."""
        two_tower: Any = self.accelerator.unwrap_model(self.model)
        if not is_sharded(self.model):
            return two_tower
        if self.twin is None:
            drain(two_tower)
            return two_tower
        fill(self.twin, two_tower)
        return self.twin

    @contextmanager
    def _watchdog(self) -> Iterator[Watchdog]:
        path = RunFolder(self.run_dir).stacks / f"rank_{self.accelerator.process_index}.txt"
        watchdog = Watchdog(path, self.step_timeout)
        try:
            yield watchdog
        finally:
            watchdog.close()


class _Window:
    """Sums since the last log line; tensors stay on the device until `means`, so that no step waits for it."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.steps = self.skipped = 0
        self.wait_seconds = self.step_seconds = self.lr_factor = 0.0

    def add(self, metrics: dict[str, torch.Tensor], wait: float, seconds: float, factor: float) -> None:
        skipped = bool(metrics.pop("skipped"))
        if not skipped:  # a loss that is no number would hide those of the other steps
            for key, value in metrics.items():
                self.sums[key] = self.sums[key] + value.float() if key in self.sums else value.float()
        self.steps += 1
        self.skipped += skipped
        self.wait_seconds += wait
        self.step_seconds += seconds
        self.lr_factor = factor

    def means(self) -> dict[str, float]:
        return {key: float(value) / (self.steps - self.skipped) for key, value in self.sums.items()}


@contextmanager
def _closing(loader: Any, saver: Saver) -> Iterator[None]:
    """End the loader's workers however the loop ends: they ignore the signal by which Python ends them at exit."""
    try:
        yield
    finally:
        getattr(loader, "close", lambda: None)()
        saver.finish()

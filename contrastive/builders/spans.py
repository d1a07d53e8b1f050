"""From the spans of a recipe (steps, shares, epochs, times) to places in a run."""

from __future__ import annotations

import math

from contrastive.builders.model import towers_of
from contrastive.config import (
    Config,
)
from contrastive.config.combinations import LENGTHS
from contrastive.config.spans import SECONDS, period_parts
from contrastive.errors import UserError
from contrastive.training import (
    Duration,
    Every,
    Point,
    Schedule,
)


def build_duration(config: Config, samples: int) -> Duration:
    """The duration of a recipe; an epoch is `samples` pairs, and a started step is a step."""
    train = config.train
    if train.minutes is not None:
        return Duration(minutes=train.minutes)
    if train.steps is not None:
        return Duration(steps=train.steps)
    wanted = train.samples if train.samples is not None else round((train.epochs or 0) * samples)
    return Duration(steps=max(1, math.ceil(wanted / train.global_batch)))


def share_or_steps(value: int | str | None) -> int | float | None:
    """``"5%"`` → 0.05; a number of steps stays one."""
    return float(value[:-1]) / 100 if isinstance(value, str) else value


def build_every(value: int | str | None, epoch: int, batch: int) -> Every | None:
    """``500``, ``"5%"``, ``"10m"``, ``"2 epochs"``, ``"50000 samples"``; an epoch is `epoch` pairs."""
    if value is None or isinstance(value, int):
        return None if value is None else Every(steps=value)
    if value.endswith("%"):
        return Every(share=float(value[:-1]) / 100)
    number, unit = period_parts(value)
    if unit in SECONDS:
        return Every(seconds=number * SECONDS[unit])
    return Every(steps=max(1, round(number * (epoch if unit == "epoch" else 1) / batch)))


def build_unfreezing(config: Config, epoch: int, duration: Duration) -> dict[str, Point]:
    """Until where each tower is locked, of those that are for a while; an epoch is `epoch` pairs.

    Raises:
        UserError: the run ends before that.
    """
    until = {}
    for tower, choice in towers_of(config).items():
        every = build_every(choice.unfreeze_at, epoch, config.train.global_batch)
        if every is None:
            continue
        if every.steps is not None and duration.steps is not None and every.steps >= duration.steps:
            raise UserError(
                f"model.{tower}.unfreeze_at: {choice.unfreeze_at} is step {every.steps} of a run of {duration.steps}; "
                f"set it lower, or model.{tower}.locked to true"
            )
        until[tower] = Point(steps=every.steps, share=every.share)
    return until


def build_schedule(config: Config, duration: Duration) -> Schedule:
    """Warm-up and shape of the learning rate.

    Raises:
        UserError: the warm-up is longer than the run.
    """
    warmup = share_or_steps(config.optim.warmup)
    if duration.steps is not None and isinstance(warmup, int) and warmup > duration.steps:
        length = ", ".join(f"{name} {getattr(config.train, name):g}" for name in LENGTHS if getattr(config.train, name))
        raise UserError(
            f"optim.warmup: {warmup} steps of warm-up do not fit into train.{length}, {duration.steps} steps; set it "
            "lower, or give a share of the run such as 5%"
        )
    if isinstance(warmup, float):
        return Schedule(warmup_share=warmup, shape=config.optim.schedule)
    return Schedule(warmup_steps=warmup or 0, shape=config.optim.schedule)

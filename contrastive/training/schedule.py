"""How long a run lasts and what the learning rate is on the way."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Duration:
    """The length of a run: a number of optimizer steps, or minutes of training time (validation not counted).

    Steps, samples and epochs are all steps by the time they get here; with them a run is reproducible. With minutes
    the schedule follows the clock, so that a slow machine sees fewer samples but a whole schedule.
    """

    steps: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        assert (self.steps is None) != (self.minutes is None)

    def progress(self, step: int, seconds: float) -> float:
        """Share of the run that is done after `step` steps and `seconds` of training, 0 to 1."""
        if self.steps is not None:
            return min(1.0, step / max(1, self.steps))
        assert self.minutes is not None
        return min(1.0, seconds / (60 * self.minutes))


@dataclass(frozen=True)
class Point:
    """A place in a run: behind so many steps, or behind a share of it (one of them)."""

    steps: int | None = None
    share: float | None = None

    def reached(self, step: int, share: float) -> bool:
        """Whether it lies behind after `step` steps, which are `share` of the run."""
        if self.steps is not None:
            return step >= self.steps
        assert self.share is not None
        return share >= self.share - 1e-9  # 1e-9: 95 of 100 steps are 95 %


@dataclass(frozen=True)
class Every:
    """How often something is done: every so many steps, seconds of training, or shares of the run (one of them)."""

    steps: int | None = None
    seconds: float | None = None
    share: float | None = None

    def due(self, before: tuple[int, float, float], now: tuple[int, float, float]) -> bool:
        """Whether a multiple lies between two places of the run, each (steps, seconds of training, share done)."""
        for period, earlier, later in zip((self.steps, self.seconds, self.share), before, now, strict=True):
            if period is not None:
                # 1e-9: 5 times a fifth is to be one
                return math.floor(later / period + 1e-9) > math.floor(earlier / period + 1e-9)
        return False


@dataclass(frozen=True)
class Schedule:
    """A linear warm-up times a cosine to zero (Loshchilov & Hutter 2017, arXiv:1608.03983), or times a constant.

    Args:
        warmup_share: of the run, 0 to 1; or `warmup_steps`.
    """

    warmup_share: float = 0.0
    warmup_steps: int = 0
    shape: str = "cosine"

    def factor(self, step: int, progress: float) -> float:
        """What the base learning rate is multiplied with at step number `step` (from 0) and `progress` (0 to 1)."""
        # +1: the first step of a warm-up must move the weights a little, not by zero
        warm = 1.0
        if self.warmup_steps:
            warm = min(1.0, (step + 1) / self.warmup_steps)
        elif self.warmup_share:
            warm = min(1.0, max(progress, 1e-3) / self.warmup_share)
        if self.shape == "constant":
            return warm
        return warm * 0.5 * (1.0 + math.cos(math.pi * progress))

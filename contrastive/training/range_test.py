"""The learning-rate range test: one short run whose rate grows from step to step, and what its losses say."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

WINDOW = 5  # steps of a running median: two odd batches in a row do not move it
FIRST = 2 * WINDOW  # steps in which only a loss that is no number, or a great one, ends the test


@dataclass(frozen=True)
class RangeTest:
    """What `range_test` saw: the rate and the loss of each step that was done, and what follows.

    smoothed: the running median of the losses, centred. lowest: the rate at its lowest point. steepest: the rate at
    which it falls fastest, per factor of the rate, before that; None where it does not fall. diverged: the rate at
    which the rise began that ended the test; None where there was none up to the last rate.
    """

    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    lowest: float
    steepest: float | None
    diverged: float | None


def exponential_rates(low: float, high: float, steps: int) -> list[float]:
    """`steps` rates from `low` to `high`, each the same factor above the one before."""
    return [low * (high / low) ** (i / (steps - 1)) for i in range(steps)]


def range_test(step: Callable[[float], float], rates: Sequence[float]) -> RangeTest:
    """Take a training step at each of the growing `rates` until the loss diverges (Smith 2015, arXiv:1506.01186).

    The loss has diverged when it is no number; or when its running median is back where it started, having fallen
    before, or far above that. A contrastive loss of normalised features is bounded: a model that is lost does not
    explode, it returns to chance. The divergence began where the last rise did.

    Args:
        step: ``rate -> loss``, the loss before the step.
    """
    losses: list[float] = []
    diverged = False
    for rate in rates:
        loss = step(rate)
        losses.append(loss if math.isfinite(loss) else math.inf)
        if diverged := _has_diverged(losses):
            break
    smoothed = [median(losses[max(0, i - WINDOW // 2) : i + WINDOW // 2 + 1]) for i in range(len(losses))]
    used = list(rates[: len(losses)])
    foot = _foot_of_the_rise(smoothed) if diverged else None
    steepest = _steepest(used, smoothed)
    return RangeTest(
        used,
        losses,
        smoothed,
        used[smoothed.index(min(smoothed))],
        None if steepest is None else used[steepest],
        None if foot is None else used[foot],
    )


def _has_diverged(losses: Sequence[float]) -> bool:
    if losses[-1] == math.inf:
        return True
    if len(losses) < WINDOW:
        return False
    medians = [median(losses[i : i + WINDOW]) for i in range(len(losses) - WINDOW + 1)]
    start, best, now = medians[0], min(medians), medians[-1]
    # of one loss; the differences of neighbours have twice the variance, and a trend adds little to them
    noise = float(np.diff(losses[:FIRST]).std()) / math.sqrt(2) if len(losses) > WINDOW else 0.0
    if now > start + max(0.1 * abs(start), 8 * noise):
        return len(losses) > FIRST or now > 4 * abs(start)
    has_fallen = start - best > max(0.02 * abs(start), 4 * noise)
    return has_fallen and len(losses) > FIRST and now > best + 0.9 * (start - best)


def _foot_of_the_rise(smoothed: Sequence[float]) -> int:
    """Where the rise that ends the list began."""
    foot = len(smoothed) - 1
    while foot and smoothed[foot - 1] <= smoothed[foot]:
        foot -= 1
    return foot


def _steepest(rates: Sequence[float], smoothed: Sequence[float]) -> int | None:
    finite = np.array([value for value in smoothed if value < math.inf])
    lowest = int(finite.argmin()) if len(finite) else 0
    if lowest < 2:
        return None
    width = max(1, len(finite) // 20)  # of a mean on both sides: a slope is noisier than what it is the slope of
    padded = np.pad(finite, width, mode="edge")
    even = np.convolve(padded, np.ones(2 * width + 1) / (2 * width + 1), mode="valid")
    slopes = np.gradient(even, np.log(rates[: len(finite)]))[: lowest + 1]
    at = int(slopes.argmin())
    return at if slopes[at] < 0 else None

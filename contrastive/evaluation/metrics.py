"""Accuracies with their uncertainty. All of them are shares of samples that are right (0 or 1 each).

Shapes: N samples, K classes. A rank counts from 0: the number of wrong answers that score at least as high as
the right one. Ties therefore count *against* the model, so that a collapsed tower (all scores equal) gets 0
and not 1; a score that is not a number counts as a tie.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 1000  # of every bootstrap


def class_ranks(scores_NK: ArrayLike, target_N: ArrayLike) -> NDArray[np.int64]:
    """Rank of the right class among the K scores of each sample, ties counted against it. Shape (N,)."""
    scores, target = np.asarray(scores_NK), np.asarray(target_N)
    own = np.take_along_axis(scores, target[:, None], axis=1)
    return (~(scores < own)).sum(axis=1) - 1


def share(right_N: ArrayLike, *, seed: int = 0) -> dict[str, float]:
    """The share of samples that are right: `{"value", "low", "high"}`, with a 95 % interval.

    The interval is the percentile bootstrap over samples, 1,000 seeded resamples. The number of right samples
    in a resample of N is binomial, so it is drawn as such: the same distribution as redrawing the samples.
    """
    right = np.asarray(right_N, dtype=bool)
    assert right.size, "no samples"
    drawn = np.random.default_rng(seed).binomial(right.size, right.mean(), size=RESAMPLES) / right.size
    return _with_interval(float(right.mean()), drawn)


def mean_per_class(right_N: ArrayLike, target_N: ArrayLike, *, seed: int = 0) -> dict[str, float]:
    """Mean over the classes that occur of the share of their samples that are right, with a 95 % interval.

    Bootstrap as in `share`: a resample is a multinomial draw over the cells (class, right or wrong), which
    has the same distribution as redrawing samples. A class with no sample in a resample is left out of its
    mean.
    """
    right = np.asarray(right_N, dtype=bool)
    _, target = np.unique(np.asarray(target_N), return_inverse=True)
    classes = int(target.max()) + 1
    cells = np.bincount(2 * target + right, minlength=2 * classes)
    drawn = np.random.default_rng(seed).multinomial(right.size, cells / right.size, size=RESAMPLES)
    wrong_RK, right_RK = drawn[:, 0::2], drawn[:, 1::2]
    total_RK = wrong_RK + right_RK
    means = (right_RK / np.maximum(total_RK, 1)).sum(axis=1) / (total_RK > 0).sum(axis=1)
    value = float((cells[1::2] / (cells[0::2] + cells[1::2])).mean())
    return _with_interval(value, means)


def accuracies(
    ranks_N: ArrayLike, target_N: ArrayLike, classes: int, *, ks: Sequence[int] = (1, 5), seed: int = 0
) -> dict[str, dict[str, float]]:
    """`{"top1", "top5", "mean_per_class"}`, each `{"value", "low", "high", "chance"}`.

    Chance is a uniform guess: k/K. A top-k with k >= K is left out: it is always right.
    """
    ranks = np.asarray(ranks_N)
    result = {f"top{k}": share(ranks < k, seed=seed) | {"chance": k / classes} for k in ks if k < classes or k == 1}
    result["mean_per_class"] = mean_per_class(ranks < 1, target_N, seed=seed) | {"chance": 1 / classes}
    return result


def _with_interval(value: float, drawn: NDArray[np.float64]) -> dict[str, float]:
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {"value": value, "low": float(low), "high": float(high)}

"""Measures with their uncertainty: a 95 % interval by the percentile bootstrap over samples, 1,000 seeded resamples.

Shapes: N samples, K classes, R resamples. A rank counts from 0: the number of wrong answers that score at least as high
as the right one. Ties therefore count *against* the model, so that a collapsed tower (all scores equal) gets 0
and not 1; a score that is not a number counts as a tie.

How often each sample occurs in a resample is one multinomial draw. Where samples take few values (right or wrong, a
class, a rank) the draw is over the values with their counts: the same distribution, without a table of R x N.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

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


def mean(values_N: ArrayLike, *, seed: int = 0) -> dict[str, float]:
    """The mean of numbers: `{"value", "low", "high"}`."""
    values, counts = np.unique(np.asarray(values_N, np.float64), return_counts=True)
    drawn = [weights_RN @ values / counts.sum() for weights_RN in resamples(counts, seed)]
    return _with_interval(float(values @ counts / counts.sum()), np.concatenate(drawn))


def median(values_N: ArrayLike, *, seed: int = 0) -> dict[str, float]:
    """The median of numbers: `{"value", "low", "high"}`; of an even number of them the mean of the middle two."""
    values, counts = np.unique(np.asarray(values_N, np.float64), return_counts=True)
    total = counts.sum()
    drawn = []
    for weights_RN in resamples(counts, seed):
        reached = weights_RN.cumsum(axis=1)
        middle = [values[(reached > place).argmax(axis=1)] for place in ((total - 1) // 2, total // 2)]
        drawn.append((middle[0] + middle[1]) / 2)
    return _with_interval(float(np.median(np.asarray(values_N))), np.concatenate(drawn))


def expected_error(
    probabilities_NK: ArrayLike, target_N: ArrayLike, *, bins: int = 15, seed: int = 0
) -> dict[str, float]:
    """Expected calibration error of the likeliest class with equal bins of confidence: `{"value", "low", "high"}`.

    The sum over bins of |right - confident| / N, where a bin adds up how many of its samples are right and their
    probabilities (Guo et al. 2017). The interval redraws samples. Noise in a bin never cancels, so that redrawing
    raises the error; by as much as it does on average the draws are lowered, down to 0.
    """
    from contrastive.evaluation import calibration

    probabilities, target = np.asarray(probabilities_NK, np.float64), np.asarray(target_N)
    confidence = probabilities.max(axis=1)
    gap = (probabilities.argmax(axis=1) == target) - confidence
    member_NB = np.eye(bins)[np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)]
    gap_NB = member_NB * gap[:, None]
    ones = np.ones(len(gap), np.int64)
    drawn = [np.abs(weights_RN @ gap_NB).sum(axis=1) / len(gap) for weights_RN in resamples(ones, seed)]
    value, draws = float(calibration.expected_error(probabilities, target, bins=bins)), np.concatenate(drawn)
    return _with_interval(value, np.maximum(draws - (draws.mean() - value), 0.0))


def confusion(target_N: ArrayLike, predicted_N: ArrayLike, classes: int) -> NDArray[np.int64]:
    """How many samples of class i were taken for class j, (K, K). Both are numbers from 0 to K - 1."""
    cells = np.asarray(target_N, np.int64) * classes + np.asarray(predicted_N, np.int64)
    return np.bincount(cells, minlength=classes * classes).reshape(classes, classes)


def per_class(confusion_KK: NDArray[np.int64], names: Sequence[str], *, seed: int = 0) -> list[dict[str, Any]]:
    """One row a class: `{"class", "samples", "recall": M, "precision", "f1", "taken_for", "taken_for_share"}`.

    M = `{"value", "low", "high"}`. taken_for: the wrong class that its samples are given most often; None where all are
    right. A class without samples has no recall, one that is never predicted no precision: None.
    """
    rows = []
    for index, name in enumerate(names):
        samples, predicted = int(confusion_KK[index].sum()), int(confusion_KK[:, index].sum())
        right = int(confusion_KK[index, index])
        wrong = confusion_KK[index].copy()
        wrong[index] = 0
        worst = int(wrong.argmax())
        rows.append(
            {
                "class": name,
                "samples": samples,
                "recall": share(np.arange(samples) < right, seed=seed) if samples else None,
                "precision": right / predicted if predicted else None,
                "f1": 2 * right / (samples + predicted) if samples + predicted else None,
                "taken_for": names[worst] if wrong[worst] else None,
                "taken_for_share": float(wrong[worst] / samples) if samples else 0.0,
            }
        )
    return rows


def resamples(counts_V: NDArray[np.int64], seed: int, total: int = RESAMPLES) -> Iterator[NDArray[np.float64]]:
    """How often each of V values occurs in a resample of `counts_V.sum()` samples: blocks (R, V) of 1,000 in all.

    Blocks hold at most 4 million numbers. A seed gives the same resamples for every measure on the same counts.
    """
    random = np.random.default_rng(seed)
    block = max(1, min(total, 4_000_000 // len(counts_V)))
    for start in range(0, total, block):
        rows = min(block, total - start)
        yield random.multinomial(counts_V.sum(), counts_V / counts_V.sum(), size=rows).astype(np.float64)


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

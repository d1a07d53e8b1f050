"""Are probabilities what they say? Reliability, expected calibration error, and the temperature that mends both.

Legend: N samples, K classes. Temperature scaling and the error are those of Guo et al. 2017 (arXiv:1706.04599).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import logsumexp, softmax

from contrastive.errors import UserError
from contrastive.evaluation.checks import check_class_numbers

BOUNDS = (1e-3, 1e3)  # of a temperature: where every sample is right, the log loss falls for ever as it goes to 0


def temperature(logits_NK: ArrayLike, target_N: ArrayLike) -> float:
    """The divisor of the logits that minimises the log loss, within 0.001 to 1,000.

    The loss is convex in the inverse of the temperature, so that its derivative has one zero. No sample's best class
    changes. Fit it on a validation split, never on what it is then measured on.

    Raises `UserError` for no samples, and for logits that are not finite.
    """
    logits, target = _checked(logits_NK, target_N, "logits")
    own_N = np.take_along_axis(logits, target[:, None], axis=1)[:, 0]

    def slope(log_inverse: float) -> float:
        """Derivative of the log loss by the inverse temperature: expected logit minus that of the right class."""
        expected_N = (softmax(np.exp(log_inverse) * logits, axis=1) * logits).sum(axis=1)
        return float((expected_N - own_N).mean())

    low, high = -np.log(BOUNDS[1]), -np.log(BOUNDS[0])
    if slope(low) >= 0:  # no better than a guess at any temperature: as flat as it goes
        return BOUNDS[1]
    if slope(high) <= 0:
        return BOUNDS[0]
    return float(np.exp(-brentq(slope, low, high, xtol=1e-10)))


def log_loss(logits_NK: ArrayLike, target_N: ArrayLike) -> float:
    """Mean negative log probability of the right class, natural logarithm."""
    logits, target = _checked(logits_NK, target_N, "logits")
    own_N = np.take_along_axis(logits, target[:, None], axis=1)[:, 0]
    return float((logsumexp(logits, axis=1) - own_N).mean())


def reliability(probabilities_NK: ArrayLike, target_N: ArrayLike, bins: int = 15) -> list[dict[str, float]]:
    """Samples by the probability of their best class, in `bins` equal ranges of 0 to 1; empty ranges are left out.

    Each `{"confidence", "accuracy", "samples"}`: mean probability, share that is right, how many; in order of
    confidence. A probability on the border of two ranges counts in the lower one.
    """
    if bins < 1:
        raise UserError(f"bins {bins}: give at least 1")
    probabilities, target = _checked(probabilities_NK, target_N, "probabilities")
    confidence_N = probabilities.max(axis=1)
    right_N = probabilities.argmax(axis=1) == target
    place_N = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], confidence_N, side="left")
    return [
        {
            "confidence": float(confidence_N[inside].mean()),
            "accuracy": float(right_N[inside].mean()),
            "samples": int(inside.sum()),
        }
        for inside in (place_N == number for number in range(bins))
        if inside.any()
    ]


def expected_error(probabilities_NK: ArrayLike, target_N: ArrayLike, bins: int = 15) -> float:
    """Expected calibration error: the mean gap of confidence and accuracy over `reliability`'s ranges, by samples."""
    rows = reliability(probabilities_NK, target_N, bins)
    samples = sum(row["samples"] for row in rows)
    return float(sum(row["samples"] * abs(row["confidence"] - row["accuracy"]) for row in rows) / samples)


def _checked(scores_NK: ArrayLike, target_N: ArrayLike, name: str) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    scores, shape = np.asarray(scores_NK, np.float64), np.shape(target_N)
    if scores.ndim != 2 or shape != scores.shape[:1] or not len(scores):
        raise UserError(f"{name}: shape {scores.shape} does not fit {shape} targets; give (n, classes) and (n,)")
    target = check_class_numbers(target_N, "targets", scores.shape[1])
    if not np.isfinite(scores).all():
        row = int((~np.isfinite(scores).all(axis=1)).argmax())
        raise UserError(f"{name}: row {row} is not finite; leave it out")
    return scores, target

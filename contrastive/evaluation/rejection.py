"""Thresholds on scores: "none of these", and any number of labels an image.

Legend: N images (of known classes where U are of unknown ones), K labels. A score is kept where it is at or above its
threshold.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from contrastive.errors import UserError
from contrastive.evaluation.label_arrays import label_array

KEPT = 0.95  # of the known, the share that a threshold keeps: the field's FPR95


def area_under_curve(known_N: ArrayLike, unknown_U: ArrayLike) -> float:
    """AUROC: the chance that a known image scores above an unknown one, a tie counted as one half."""
    known, unknown = _scores(known_N, "known"), _scores(unknown_U, "unknown")
    ranks = rankdata(np.concatenate([known, unknown]))[: len(known)]
    return float((ranks.sum() - len(known) * (len(known) + 1) / 2) / (len(known) * len(unknown)))


def keep_threshold(known_N: ArrayLike, kept: float = KEPT) -> float:
    """The highest threshold that keeps at least the share `kept` of the known scores."""
    if not 0 < kept <= 1:
        raise UserError(f"kept {kept}: give a share above 0, up to 1")
    known = np.sort(_scores(known_N, "known"))[::-1]
    return float(known[int(np.ceil(round(kept * len(known), 9))) - 1])


def false_positive_rate(known_N: ArrayLike, unknown_U: ArrayLike, kept: float = KEPT) -> float:
    """The share of unknown images that pass the threshold which keeps `kept` of the known ones (FPR95)."""
    return float((_scores(unknown_U, "unknown") >= keep_threshold(known_N, kept)).mean())


def separating_threshold(known_N: ArrayLike, unknown_U: ArrayLike) -> float:
    """The threshold of the best balanced accuracy between known and unknown, half-way between two scores."""
    known, unknown = np.sort(_scores(known_N, "known")), np.sort(_scores(unknown_U, "unknown"))
    cuts = np.unique(known)
    kept = 1 - np.searchsorted(known, cuts, side="left") / len(known)
    refused = np.searchsorted(unknown, cuts, side="left") / len(unknown)
    best = int((kept + refused).argmax())
    return below(float(cuts[best]), np.concatenate([known, unknown]))


def below(cut: float, scores_N: NDArray[np.float64]) -> float:
    """Half-way from `cut` to the next lower score: a border along a sample would turn on the last bit of its score."""
    lower = scores_N[scores_N < cut]
    return float((cut + lower.max()) / 2) if len(lower) else cut - 1e-4 * max(1.0, abs(cut))


def label_thresholds(scores_NK: ArrayLike, truth_NK: ArrayLike) -> NDArray[np.float64]:
    """For each label the threshold of the best F1 on these images, (K,), half-way between two scores.

    A label that no image has gets the threshold of the best F1 over all labels together. Raises `UserError` for shapes
    that differ, scores that are not finite, and where no image has a label.
    """
    scores, given = np.asarray(scores_NK, np.float64), label_array(truth_NK, "thresholds")
    if given.dtype.kind not in "biuf" or not np.isin(given, (0, 1)).all():
        raise UserError(f"thresholds: truth must be 0 or 1 of each label; got {np.unique(given)[:5].tolist()}")
    truth = given.astype(bool)
    if scores.shape != truth.shape or scores.ndim != 2:
        raise UserError(f"thresholds: scores {scores.shape} and truth {truth.shape} differ; give (n, labels) of both")
    if not np.isfinite(scores).all():
        raise UserError("thresholds: scores are not finite; leave those images out")
    if not truth.any():
        raise UserError("thresholds: no image has any of the labels; give images that have some")
    common = _best_f1(scores.ravel(), truth.ravel())
    columns = zip(scores.T, truth.T, strict=True)
    return np.asarray([_best_f1(own, right) if right.any() else common for own, right in columns])


def _best_f1(scores_N: NDArray[np.float64], truth_N: NDArray[np.bool_]) -> float:
    """The threshold of the best F1, the highest where several are; `truth_N` must hold a true one."""
    order = np.argsort(-scores_N, kind="stable")
    scores, hits = scores_N[order], np.cumsum(truth_N[order])
    f1 = 2 * hits / (np.arange(1, len(scores) + 1) + truth_N.sum())
    f1[:-1][scores[1:] == scores[:-1]] = -1  # a threshold does not part equal scores
    return below(float(scores[f1.argmax()]), scores)


def _scores(values: ArrayLike, name: str) -> NDArray[np.float64]:
    scores = np.asarray(values, np.float64).ravel()
    if not len(scores) or not np.isfinite(scores).all():
        raise UserError(f"{name} images: {'none' if not len(scores) else 'a score is not finite'}; give readable ones")
    return scores

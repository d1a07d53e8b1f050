"""Ridge regression for every penalty from one eigendecomposition: the quickest probe there is.

Worth its place where a number is wanted often and soon, such as a preview while a tower trains. It is not the
probe to report: squared loss on class indicators ranks classes well and gives no probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from contrastive.errors import UserError
from contrastive.evaluation.estimator import check_features


def ridge_path(
    features_ND: ArrayLike, target_NK: ArrayLike, penalties: Sequence[float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weights (P, K, D) and intercepts (P, K) that minimise |Y - X W' - b|^2 + penalty |W|^2, b free, in float64.

    The objective of scikit-learn's `Ridge`. With X'X = V diag(s) V', every penalty's solution is
    V diag(1 / (s + penalty)) V' X'Y: one eigendecomposition, then a product a penalty. Of the smaller of X'X and XX'.

    target_NK: numbers; for classes, columns of 1 for the class and 0 (or -1) elsewhere, then the largest score wins.
    Raises `UserError` for a penalty that is not positive, non-finite features, or lengths that differ.
    """
    features = check_features(features_ND, "ridge").astype(np.float64)
    target = np.asarray(target_NK, dtype=np.float64)
    if target.ndim != 2 or len(target) != len(features):
        raise UserError(f"ridge: target: needs shape ({len(features)}, columns), got {target.shape}")
    wrong = [p for p in penalties if not (np.isfinite(p) and p > 0)]
    if wrong:
        raise UserError(f"ridge: penalties: {wrong[0]} is not a positive number; give one such as 1.0")
    mean_D, mean_K = features.mean(axis=0), target.mean(axis=0)
    centred, wanted = features - mean_D, target - mean_K
    samples, width = centred.shape
    if width <= samples:
        power, basis = np.linalg.eigh(centred.T @ centred)
        right = basis.T @ (centred.T @ wanted)
        left = basis
    else:
        power, basis = np.linalg.eigh(centred @ centred.T)
        right = basis.T @ wanted
        left = centred.T @ basis
    power = power.clip(min=0)
    coef_PKD = np.stack([(left @ (right / (power + penalty)[:, None])).T for penalty in penalties])
    return coef_PKD, mean_K - coef_PKD @ mean_D

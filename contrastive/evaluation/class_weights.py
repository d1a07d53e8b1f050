"""Weights of samples, by class and by sample, as scikit-learn takes them.

Legend: N samples, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from contrastive.errors import UserError
from contrastive.wording import a_type, first_few, plain_repr

ClassWeight = Mapping[Any, float] | str | None


def sample_weights(
    class_weight: ClassWeight, sample_weight: ArrayLike | None, target_N: NDArray[np.int64], classes_K: NDArray[Any]
) -> NDArray[np.float64] | None:
    """The weight of each sample: the weight of its class times its own; None where neither is given.

    class_weight: "balanced" gives N / (K n) to a class of n samples, where N and n add up sample weights; or class ->
        weight, 1 for classes that are not named.
    sample_weight: (N,); 0 leaves a sample out.

    Raises `UserError` for a weight that is negative or not finite, another length than N, a class that is not there,
    and where a class keeps no weight.
    """
    if class_weight is None and sample_weight is None:
        return None
    own_N: NDArray[np.float64] = np.ones(len(target_N)) if sample_weight is None else _own(sample_weight, len(target_N))
    counts_K: NDArray[np.float64] = np.bincount(target_N, own_N, len(classes_K)).astype(np.float64)
    empty = np.flatnonzero(counts_K <= 0)
    if len(empty):
        raise UserError(f"probe: sample_weight: class {classes_K[empty[0]]} has no weight; leave its samples out")
    if class_weight is None:
        return own_N
    weights_N: NDArray[np.float64] = own_N * _of_classes(class_weight, counts_K, classes_K)[target_N]
    return weights_N


def _own(sample_weight: ArrayLike, rows: int) -> NDArray[np.float64]:
    try:
        weights = np.asarray(sample_weight, np.float64)
    except (TypeError, ValueError):
        raise UserError("probe: sample_weight: not numbers; give one number a row") from None
    if weights.ndim == 0:
        weights = np.full(rows, float(weights))
    if weights.ndim != 1:
        raise UserError(f"probe: Sample weights must be 1D array or scalar, got shape {weights.shape}; give ({rows},)")
    if len(weights) != rows:
        raise UserError(
            f"probe: sample_weight.shape == {weights.shape}, expected {(rows,)}! {len(weights)} weights for {rows} rows"
        )
    wrong = ~(np.isfinite(weights) & (weights >= 0))
    if wrong.any():
        row = int(wrong.argmax())
        raise UserError(f"probe: sample_weight: row {row} weighs {weights[row]:g}; give 0 or more")
    if not weights.any():
        raise UserError("probe: sample_weight: all weights are zero; give some samples a positive one")
    return weights


def _of_classes(
    class_weight: Mapping[Any, float] | str, counts_K: NDArray[np.float64], classes_K: NDArray[Any]
) -> NDArray[np.float64]:
    if isinstance(class_weight, str):
        if class_weight != "balanced":
            raise UserError(
                f"probe: class_weight: '{class_weight}' is unknown; use balanced, or a dict class -> weight"
            )
        balanced: NDArray[np.float64] = counts_K.sum() / (len(counts_K) * counts_K)
        return balanced
    if not isinstance(class_weight, Mapping):
        raise UserError(
            f"probe: class_weight: {a_type(class_weight)} is given; use balanced, or a dict class -> weight"
        )
    known = {name: index for index, name in enumerate(classes_K.tolist())}
    unknown = [name for name in class_weight if name not in known]
    if unknown:
        missing, classes = first_few(map(plain_repr, unknown)), first_few(map(plain_repr, known))
        raise UserError(f"probe: class_weight: no such class: {missing}; the classes are {classes}")
    weights = np.ones(len(known))
    for name, weight in class_weight.items():
        if not isinstance(weight, (int, float, np.number)) or not np.isfinite(weight) or weight <= 0:
            raise UserError(f"probe: class_weight: {name!r} weighs {weight!r}; give a positive number")
        weights[known[name]] = weight
    return weights

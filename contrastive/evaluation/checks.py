"""What is wrong with a labelled set or with features, told before anything is measured: each raises one `UserError`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from contrastive.errors import UserError
from contrastive.evaluation.label_arrays import label_array
from contrastive.wording import first_few


def check_finite(name: str, keys: Sequence[str], rows_ND: NDArray[np.floating]) -> None:
    """Raises `UserError` with the first image or caption whose features are not numbers."""
    bad = ~np.isfinite(rows_ND).all(axis=1)
    if bad.any():
        raise UserError(
            f"{name}: {bad.sum()} of {len(bad)} feature rows are not finite, the first is that of "
            f"{keys[int(bad.argmax())]}; the model or the precision is broken: try another --dtype, or train again"
        )


def check_class_numbers(target: ArrayLike, where: str, classes: int | None = None) -> NDArray[np.int64]:
    """The target (N,) as numbers of classes, from 0 to below `classes`.

    Raises `UserError` for a missing label, for texts, which `np.unique` numbers, and for a number out of range.
    """
    found = label_array(target, where)
    if found.dtype.kind not in "iub":
        kind = "text" if found.dtype.kind in "UO" else found.dtype.name
        raise UserError(
            f"{where}: labels are {kind}, not numbers of classes; give "
            "np.unique(labels, return_inverse=True)[1], or their places in the list of labels"
        )
    wrong = (found < 0) | (found >= classes if classes is not None else False)
    if wrong.any():
        row = int(np.argwhere(wrong)[0, 0])
        number = int(found[wrong][0])
        reason = "which is negative" if number < 0 else f"but there are {classes}"
        raise UserError(f"{where}: row {row} has class {number}, {reason}; number the classes from 0")
    return found.astype(np.int64)


def check_known(name: str, found: NDArray[np.str_], names: Sequence[str]) -> None:
    """Zero-shot: raises `UserError` for a label of the set that is not among those given."""
    missing = sorted(set(found) - set(names))
    if missing:
        close = difflib.get_close_matches(missing[0], names, n=1)
        hint = f"; did you mean '{missing[0]}' by '{close[0]}'?" if close else ""
        raise UserError(f"{name}: labels that are not among those given: {first_few(missing)}{hint}")


def check_trained(
    name: str, train: Any, train_labels: Sequence[str] | NDArray[np.str_], test_labels: Sequence[str] | NDArray[np.str_]
) -> None:
    """Raises `UserError` for fewer than two classes to learn, and for a test label that was not trained on."""
    classes = sorted(set(train_labels))
    if len(classes) < 2:
        raise UserError(f"{name}: {train} has one class only, {classes[0]}; a classifier needs at least two")
    unknown = sorted(set(test_labels) - set(classes))
    if unknown:
        raise UserError(
            f"{name}: labels without training images in {train}: {', '.join(unknown[:5])}; take them out or train on "
            "them"
        )


def possible_shots(
    name: str, train_labels: Sequence[str] | NDArray[np.str_], shots: Sequence[int] | None, usual: Sequence[int]
) -> list[int]:
    """The numbers of shots to try: those asked for, or of the usual ones those that every class has images for.

    Raises `UserError` where a class has fewer images than asked shots, and for a number that is not positive.
    """
    classes, counts = np.unique(np.asarray(train_labels), return_counts=True)
    fewest, smallest = int(counts.min()), str(classes[counts.argmin()])
    if shots is None:
        return [count for count in usual if count <= fewest]
    wrong = [count for count in shots if count < 1]
    if wrong or not len(shots):
        shown = ", ".join(map(str, wrong)) or "none"
        raise UserError(f"{name}: shots: {shown}: give numbers from 1 up, such as 1,4,16")
    if max(shots) > fewest:
        raise UserError(
            f"{name}: shots: {max(shots)} asked for, but {smallest} has {fewest} training "
            f"image{'s' if fewest > 1 else ''}; ask for at most {fewest}, or add images"
        )
    return sorted(set(shots))

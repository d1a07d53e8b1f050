"""Labels of samples as an array without gaps, and their places among the classes of a classifier.

Every public function that takes labels calls one of these, so that a label of another type is never counted as wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from contrastive.errors import UserError
from contrastive.wording import a_type, first_few


def label_array(y: ArrayLike | None, name: str) -> NDArray[Any]:
    """Labels as an array of text, whole numbers or truth values, (n,) or (n, labels).

    Raises `UserError` for a missing label (None, NaN, pandas' NA, a masked value, an empty text), with its row; for
    text and numbers mixed; and for anything else, such as bytes or dates.
    """
    if y is None:
        raise UserError(f"{name}: requires y to be passed, but the target y is None; give one label a row")
    if hasattr(y, "detach"):  # a torch tensor, perhaps on another device
        y = y.detach().cpu().numpy()
    if np.ma.isMaskedArray(y):
        _refuse_rows(np.ma.getmaskarray(y), name, "masked")
    plain: Any = y
    found = _array(plain, None, name)
    if found.dtype.kind in "iub":
        return found
    if found.dtype.kind == "f":
        _check_floats(found, name)
        return found
    if isinstance(plain, np.ndarray) and found.dtype.kind == "U":
        return _with_text(found, name)
    # numpy makes the text "nan" of the second item of ["cat", nan]: the items are checked one by one.
    items = _array(plain, object, name)
    return _of_objects(items, name)


def label_places(y: ArrayLike | None, classes: ArrayLike, name: str) -> NDArray[np.int64]:
    """The place of each label (n,) in `classes` (K,).

    Raises `UserError` as `label_array` does, for labels of another type than the classes, and for labels that are not
    among them (the first five are named).
    """
    labels, known = label_array(y, name), np.asarray(classes)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        raise UserError(f"{name}: y must have shape (n,), got {labels.shape}; give one label a row")
    names = known.tolist()
    if len(labels) and (labels.dtype.kind in "UO") != any(isinstance(one, str) for one in names):
        shown = ", ".join(map(str, names[:3])) + (", …" if len(names) > 3 else "")
        first = labels[:1].tolist()[0]
        if isinstance(first, str):
            raise UserError(
                f"{name}: the labels y are text (the first is '{first}'), the classes are numbers ({shown}); "
                "pass numbers, such as y.astype(int)"
            )
        raise UserError(
            f"{name}: the labels y are numbers (the first is {first}), the classes are text ({shown}); pass names: "
            "classes_[y] where the numbers are places in classes_"
        )
    place = {label: index for index, label in enumerate(names)}
    distinct, inverse = np.unique(labels, return_inverse=True)
    unknown = [label for label in distinct.tolist() if label not in place]
    if unknown:
        raise UserError(
            f"{name}: labels that are not among the classifier's: {first_few(unknown)}; "
            "leave those rows out, or fit with these classes"
        )
    return np.asarray([place[label] for label in distinct.tolist()], np.int64)[inverse.reshape(labels.shape)]


def check_rows(labels: Sequence[Any] | NDArray[Any], rows: int, name: str) -> None:
    """Raises `UserError` unless there is one label a row."""
    if len(labels) != rows:
        raise UserError(f"{name}: {rows} feature rows but {len(labels)} labels; give one label a row")


def is_missing(value: Any) -> bool:
    """Whether a value means "no label": None, NaN, NaT, pandas' NA, or a text of white space."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return True
    if isinstance(value, str):
        return False
    try:
        return bool(value != value)  # NaN and NaT differ from themselves
    except (TypeError, ValueError):  # pandas' NA has no truth value
        return type(value).__name__ == "NAType"


def _array(y: Any, dtype: Any, name: str) -> NDArray[Any]:
    try:
        return np.asarray(y, dtype=dtype)
    except (ValueError, TypeError) as fault:
        raise UserError(f"{name}: the labels y make no array ({fault}); give one label a row") from None


def _check_floats(labels: NDArray[Any], name: str) -> None:
    wrong = ~np.isfinite(labels)
    if wrong.any():
        kind = "NaN" if np.isnan(labels).any() else "infinity"
        row = int(np.argwhere(wrong)[0, 0])
        raise UserError(f"{name}: Input y contains {kind}, first in row {row}; leave out rows without a label")
    if (labels != np.floor(labels)).any():
        raise UserError(f"{name}: Unknown label type: continuous; labels are names or whole numbers")


def _refuse_rows(missing: NDArray[np.bool_], name: str, what: Any) -> None:
    if missing.any():
        row = int(np.argwhere(missing)[0, 0])
        more = f", and {missing.sum() - 1:,} more" if missing.sum() > 1 else ""
        raise UserError(f"{name}: row {row} has no label ({what}{more}); leave out rows without a label")


def _with_text(labels: NDArray[Any], name: str) -> NDArray[Any]:
    _refuse_rows(np.char.str_len(np.char.strip(labels)) == 0, name, "an empty text")
    return labels


def _of_objects(items: NDArray[Any], name: str) -> NDArray[Any]:
    flat = items.ravel().tolist()
    missing = np.asarray([is_missing(one) for one in flat], bool).reshape(items.shape)
    if missing.any():
        first = flat[int(missing.ravel().argmax())]
        _refuse_rows(missing, name, "an empty text" if isinstance(first, str) else first)
    texts = np.asarray([isinstance(one, str) for one in flat], bool)
    if texts.all():
        return items if items.dtype == object else items.astype(str)
    if texts.any():
        odd, usual = int((~texts).argmax()), int(texts.argmax())
        raise UserError(
            f"{name}: labels are text and other values mixed: {flat[usual]!r} and {flat[odd]!r} "
            f"({a_type(flat[odd])}); give all as text, or all as numbers"
        )
    numbers = (bool, int, float, np.bool_, np.integer, np.floating)
    other = next((one for one in flat if not isinstance(one, numbers)), None)
    if other is not None:
        raise UserError(f"{name}: Unknown label type: {other!r} is {a_type(other)}; labels are names or whole numbers")
    found = np.asarray(flat).reshape(items.shape)
    if found.dtype.kind == "f":
        _check_floats(found, name)
    return found

"""What scikit-learn asks of a classifier, without scikit-learn: parameters, tags, and checks of input.

An estimator that has these works in `Pipeline`, `GridSearchCV` and `clone`; only tags and the not-fitted exception
need scikit-learn's own classes, and they are asked for only where scikit-learn is loaded already.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from contrastive.errors import UserError
from contrastive.evaluation.label_arrays import check_rows, label_array


class Estimator:
    """Parameters are the arguments of `__init__`, stored under their names as they came."""

    @classmethod
    def _names(cls) -> list[str]:
        return [name for name in inspect.signature(cls.__init__).parameters if name != "self"]

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Name -> value. `deep` changes nothing: no parameter is an estimator."""
        return {name: getattr(self, name) for name in self._names()}

    def set_params(self, **params: Any) -> Estimator:
        """Change parameters by name; `UserError` for a name that `__init__` has not."""
        for name, value in params.items():
            if name not in self._names():
                raise UserError(f"{type(self).__name__}: no parameter '{name}'; use one of {', '.join(self._names())}")
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        defaults = inspect.signature(type(self).__init__).parameters
        changed = [
            f"{name}={value!r}" for name, value in self.get_params().items() if value is not defaults[name].default
        ]
        return f"{type(self).__name__}({', '.join(changed)})"

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import ClassifierTags, Tags, TargetTags  # only scikit-learn asks for tags

        return Tags(
            estimator_type="classifier",
            target_tags=TargetTags(required=True, multi_output=True),
            transformer_tags=None,
            classifier_tags=ClassifierTags(multi_label=True),
            regressor_tags=None,
        )


def not_fitted(name: str) -> ValueError:
    """The exception for a call before `fit`: scikit-learn's own where it is loaded, as its tools look for it."""
    message = f"{name}: this estimator is not fitted yet; call fit first"
    exceptions = sys.modules.get("sklearn.exceptions")
    return exceptions.NotFittedError(message) if exceptions else UserError(message)


def check_features(X: ArrayLike, name: str = "probe", rows: int = 1) -> NDArray[np.floating]:
    """Features as a finite array (n, dim) of float32 or float64, n >= `rows`; `UserError` says which row is not."""
    if hasattr(X, "detach"):  # a torch tensor, perhaps on another device
        X = X.detach().cpu().float().numpy()
    if hasattr(X, "toarray"):
        raise UserError(f"{name}: features are sparse, which is not supported; pass X.toarray()")
    features = np.asarray(X)
    if features.dtype.kind == "c":
        raise UserError(f"{name}: Complex data not supported: features are {features.dtype}; pass real numbers")
    if features.dtype not in (np.float32, np.float64):
        features = features.astype(np.float64)
    if features.ndim != 2:
        raise UserError(f"{name}: features must have shape (n, dim), got {features.shape}. Reshape your data")
    if features.shape[1] < 1:
        raise UserError(
            f"{name}: 0 feature(s) (shape={features.shape}) while a minimum of 1 is required; pass wider features"
        )
    if len(features) < rows:
        raise UserError(
            f"{name}: {len(features)} sample(s) (n_samples = {len(features)}, shape={features.shape}) while a minimum "
            f"of {rows} is required; pass more rows"
        )
    bad = ~np.isfinite(features).all(axis=1)
    if bad.any():
        raise UserError(
            f"{name}: features: {bad.sum()} of {len(features)} rows are not finite (NaN or inf), the first is "
            f"row {bad.argmax()}; leave them out"
        )
    return features


def check_labels(y: ArrayLike | None, rows: int, name: str = "probe") -> NDArray[Any]:
    """Labels (n,), or 0 and 1 as (n, labels >= 2) for several labels a row. A column (n, 1) is taken as (n,).

    Raises `UserError` as `label_array` does, for another number of labels than `rows`, and for a column of one value.
    """
    labels = check_label_shape(y, rows, name)
    if labels.ndim == 2:
        constant = (labels == labels[:1]).all(axis=0)
        if constant.any():
            column = int(constant.argmax())
            raise UserError(
                f"{name}: label column {column} is {labels[0, column]} for all {len(labels)} samples, which is one "
                "class; needs both, or leave the column out"
            )
    return labels


def check_label_shape(y: ArrayLike | None, rows: int, name: str) -> NDArray[Any]:
    """As `check_labels`, but a column of several labels a row may hold one value alone, as a test set may."""
    labels = label_array(y, name)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim not in (1, 2):
        raise UserError(f"{name}: labels must have shape (n,) or (n, labels), got {labels.shape}")
    check_rows(labels, rows, name)
    if labels.ndim == 2:
        if labels.dtype.kind not in "biuf" or not np.isin(labels, (0, 1)).all():
            raise UserError(f"{name}: several labels a row must be 0 or 1; got {np.unique(labels)[:5].tolist()}")
        labels = labels.astype(np.int64)
    return labels

"""A linear classifier on frozen features: `LinearProbe`, its choice of strength, and its file."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from scipy.special import expit, log_expit, log_softmax, softmax

from contrastive.errors import UserError
from contrastive.evaluation.class_weights import ClassWeight, sample_weights
from contrastive.evaluation.estimator import (
    Estimator,
    check_features,
    check_label_shape,
    check_labels,
    not_fitted,
)
from contrastive.evaluation.label_arrays import check_rows, label_places
from contrastive.evaluation.softmax import SoftmaxRegression, Solutions
from contrastive.shards.decode import DECODER_VERSION, check_decoder

PRESETS = {
    # Radford et al. 2021, appendix A.3: 96 steps; theirs is a binary search with scikit-learn, ours solves all of them.
    "clip": tuple(float(c) for c in np.logspace(-6, 6, 96)),
    # Oquab et al. 2024, DINOv2's eval/log_regression.py: C_POWER_RANGE = linspace(-6, 5, 45)
    "dinov2": tuple(float(c) for c in np.logspace(-6, 5, 45)),
}
COARSE = tuple(10.0**power for power in range(-4, 7))  # of "default"
FINE_STEPS = (0.5, 0.25)  # of a factor of ten: the ladder ends at a factor of 1.8
SWEEP_TOLERANCE = 1e-4  # enough to rank strengths; the refit goes on to `tol`


class LinearProbe(Estimator):
    """Softmax regression on frozen features, the objective of scikit-learn's `LogisticRegression`.

    C * sum of cross-entropies + 1/2 |W|^2, the intercept free; the solution is the optimum itself, to `tol`. A weight,
    of a class or a sample, multiplies the sample's cross-entropy.
    With two classes there are still two rows of weights, which equals scikit-learn's single one at 2 C.
    Several labels a sample, y of 0 and 1 with shape (n, labels), are independent sigmoids (one-vs-rest).

    C: a number; a sequence of numbers to choose among; or a preset:
        "clip": 96 strengths from 1e-6 to 1e6 (Radford et al. 2021). "dinov2": 45 from 1e-6 to 1e5 (Oquab et al. 2024).
        "default", or None: from 1e-4 to 1e6, first in steps of a factor of 10, then halving the step around the
        best one down to a factor of 1.8. The coarse sweep stops when both accuracy and cross-entropy get worse:
        larger C only fit the noise more closely, and slowly.
        A warning is given when the best strength is the smallest or the largest that was allowed.
    validation: share of the *training* samples, drawn class by class, that strengths are compared on.
        Afterwards the probe is fitted again to all of them. The better accuracy wins, at a tie the smaller
        cross-entropy; with several labels a sample the smaller cross-entropy alone. Both are means by the same weights
        as the fit's ("balanced" counts all training samples, once), so that a balanced probe chooses by the mean
        accuracy of the classes.
    seed: of that split.
    class_weight: "balanced", a dict class -> weight, or None; see `sample_weights`. One label a sample only.
    tol: the fit ends when its gradient bounds what is left above the optimum by this share of the objective.
    max_iter: iterations of L-BFGS; a fit that ends there warns that it is short of `tol`.

    Features are taken as they are: standardising them would change the optimum.

    Learned: `coef_ (classes, dim)`, `intercept_ (classes,)` (float64), `classes_` (column numbers with several labels
    a sample), `C_`, `kkt_` (Euclidean norm of the objective's gradient at the solution), `n_iter_`, `n_features_in_`,
    `multilabel_`, `metadata_`, and `curve_`: one dict a strength in order of C with C, accuracy, cross_entropy (means
    over the validation samples) and iterations; empty when C is a number.
    """

    def __init__(
        self,
        C: float | Sequence[float] | str | None = None,
        *,
        validation: float = 0.15,
        seed: int = 0,
        tol: float = 1e-7,
        max_iter: int = 10_000,
        class_weight: ClassWeight = None,
    ) -> None:
        self.class_weight = class_weight
        self.C, self.validation, self.seed, self.tol, self.max_iter = C, validation, seed, tol, max_iter

    def fit(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> LinearProbe:
        """Fit to features X (n, dim) and labels y: (n,) strings or integers, or (n, labels) of 0 and 1.

        sample_weight: (n,), how much each sample counts; 0 leaves it out.

        Raises `UserError` for non-finite features, a missing label, fewer than two classes, a C that is not positive,
        lengths that differ, and weights that are not valid (see `sample_weights`).
        """
        features = check_features(X)
        labels = check_labels(y, len(features))
        self.multilabel_ = labels.ndim == 2
        if self.multilabel_:
            self.classes_, target = np.arange(labels.shape[1]), labels
        else:
            self.classes_, target = np.unique(labels, return_inverse=True)
            if len(self.classes_) < 2:
                found = ", ".join(map(str, self.classes_)) or "none"
                classes = "1 class" if len(self.classes_) else "no class"
                raise UserError(f"probe: needs at least two classes, the training labels have {classes}: {found}")
        if self.multilabel_ and self.class_weight is not None:
            raise UserError("probe: class_weight: needs one label a sample; with several give sample_weight")
        numbers = np.zeros(len(target), np.int64) if self.multilabel_ else target
        weights = sample_weights(self.class_weight, sample_weight, numbers, self.classes_[: numbers.max() + 1])
        if weights is not None and not weights.all():
            features, target, weights = features[weights > 0], target[weights > 0], weights[weights > 0]
        self.n_features_in_ = features.shape[1]
        self.metadata_: dict[str, Any] = {}
        self.curve_: list[dict[str, float]] = []
        start = None
        if self.C is None or isinstance(self.C, str) or np.ndim(self.C) > 0:
            self.C_, start = self._choose(features, target, weights)
        else:
            self.C_ = _positive(float(self.C))  # type: ignore[arg-type]
        solution = self._problem(features, target, weights).solve(
            [self.C_], tolerance=self.tol, max_iter=self.max_iter, start=start
        )
        assert isinstance(solution, Solutions)
        self.coef_, self.intercept_ = solution.coef_PKD[0], solution.intercept_PK[0]
        self.kkt_ = float(solution.kkt_P[0])
        if solution.iterations_P[0] >= self.max_iter:
            gap = self.kkt_**2 / 2 / float(solution.objective_P[0])
            warnings.warn(
                f"probe: max_iter: {self.max_iter} iterations end within {gap:.1g} of the optimum, C = {self.C_:.3g}, "
                f"short of tol {self.tol:g}; raise max_iter or lower C",
                stacklevel=2,
            )
        self.n_iter_ = max(1, int(solution.iterations_P[0]))  # 0 where the sweep had ended at the optimum
        return self

    @property
    def validation_curve_(self) -> list[tuple[float, float]]:
        """`curve_` as pairs (C, accuracy)."""
        return [(entry["C"], entry["accuracy"]) for entry in self.curve_]

    def logits(self, X: ArrayLike) -> NDArray[np.float64]:
        """Scores (n, classes), two columns for two classes. Raises `UserError` for another width than at the fit."""
        if not hasattr(self, "coef_"):
            raise not_fitted(type(self).__name__)
        features = check_features(X)
        if features.shape[1] != self.coef_.shape[1]:
            raise UserError(
                f"probe: X has {features.shape[1]} features, but {type(self).__name__} is expecting "
                f"{self.coef_.shape[1]} features as input; use the model and the kind of features that it was "
                "fitted with"
            )
        return features @ self.coef_.T + self.intercept_

    def decision_function(self, X: ArrayLike) -> NDArray[np.float64]:
        """As scikit-learn's: `logits`, but of two classes the difference (n,), positive for the second class."""
        logits = self.logits(X)
        return logits[:, 1] - logits[:, 0] if len(self.classes_) == 2 and not self.multilabel_ else logits

    def predict_proba(self, X: ArrayLike) -> NDArray[np.float64]:
        """Probabilities (n, classes), in the order of `classes_`; rows sum to 1 unless there are several labels."""
        logits = self.logits(X)
        return expit(logits) if self.multilabel_ else softmax(logits, axis=1)

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """The likeliest class of each row, (n,); with several labels 0 or 1 of each, (n, labels)."""
        logits = self.logits(X)
        return (logits > 0).astype(np.int64) if self.multilabel_ else self.classes_[logits.argmax(axis=1)]

    def score(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
        """Share of the rows whose predicted class is `y`; with several labels, of the rows that are right in all.

        sample_weight: (n,), makes it a share of their sum.
        Raises `UserError` for labels of another type than `classes_`, and for classes that were not fitted.
        """
        logits = self.logits(X)
        if self.multilabel_:
            truth = check_label_shape(y, len(logits), "score")
            if truth.shape != logits.shape:
                raise UserError(f"score: y has shape {truth.shape}; give 0 or 1 for each label, {logits.shape}")
            return _share(((logits > 0) == truth).all(axis=1), sample_weight)
        place = label_places(y, self.classes_, "score")
        check_rows(place, len(logits), "score")
        return _share(logits.argmax(axis=1) == place, sample_weight)

    def save(self, path: str | Path, **metadata: Any) -> None:
        """Write one safetensors file: weights, and a JSON header with classes, C, the curve and `metadata`.

        metadata: what the user of the file must know, such as the model and the kind of features.
        """
        header = {
            "format": "contrastive.LinearProbe/2",
            "classes": self.classes_.tolist(),
            "C": self.C_,
            "kkt": self.kkt_,
            "multilabel": self.multilabel_,
            "class_weight": list(self.class_weight.items())
            if isinstance(self.class_weight, Mapping)
            else self.class_weight,
            "curve": self.curve_,
            "decoder": DECODER_VERSION,
            "metadata": self.metadata_ | metadata,
        }
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        tensors = {
            "coef": np.ascontiguousarray(self.coef_),
            "intercept": np.ascontiguousarray(self.intercept_),
        }
        save_file(tensors, str(path), metadata={"probe": json.dumps(header)})

    @classmethod
    def load(cls, path: str | Path) -> LinearProbe:
        """Read a file that `save` wrote; what was passed to it stands in `metadata_`."""
        if not Path(path).is_file():
            raise UserError(f"probe: {path}: no such file")
        try:
            with safe_open(str(path), framework="numpy") as file:
                header = json.loads((file.metadata() or {})["probe"])
                coef, intercept = file.get_tensor("coef"), file.get_tensor("intercept")
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise UserError(f"probe: {path} is not a probe file; write one with `contrastive probe fit`") from error
        weight = header.get("class_weight")  # files of older versions have none
        probe = cls(C=header["C"], class_weight=dict(weight) if isinstance(weight, list) else weight)
        probe.coef_, probe.intercept_ = coef, intercept
        probe.classes_, probe.C_ = np.asarray(header["classes"]), header["C"]
        # files of format 1 have only pairs (C, accuracy), one label a row, and no norm
        pairs = [{"C": c, "accuracy": accuracy} for c, accuracy in header.get("validation_curve", ())]
        probe.curve_ = header.get("curve", pairs)
        probe.multilabel_, probe.kkt_ = header.get("multilabel", False), header.get("kkt", float("nan"))
        probe.n_features_in_, probe.metadata_ = coef.shape[1], header["metadata"]
        if "fingerprint" in probe.metadata_:  # of the model: the features are of pictures
            check_decoder(f"probe: {path}", header.get("decoder"))
        return probe

    def _problem(
        self, features: NDArray[Any], target: NDArray[np.int64], weights: NDArray[np.float64] | None
    ) -> SoftmaxRegression:
        classes = None if self.multilabel_ else len(self.classes_)
        return SoftmaxRegression(features, target, classes, sample_weight=weights)

    def _choose(
        self, features: NDArray[Any], target: NDArray[np.int64], weights: NDArray[np.float64] | None
    ) -> tuple[float, tuple[Any, Any]]:
        """The best strength on the validation split, and the solution there."""
        adaptive = self.C is None or (isinstance(self.C, str) and self.C == "default")
        grid = COARSE if adaptive else _grid(self.C)
        fitted, held = _split(target, self.validation, self.seed)
        problem = self._problem(features[fitted], target[fitted], None if weights is None else weights[fitted])
        held_weights = None if weights is None else weights[held]
        entries: dict[float, dict[str, float]] = {}
        solutions: dict[float, tuple[Any, Any]] = {}

        def measure(strengths: Sequence[float], near: float | None = None) -> None:
            found = problem.solve(
                strengths,
                tolerance=SWEEP_TOLERANCE,
                max_iter=self.max_iter,
                start=None if near is None else solutions[near],
                polish=False,
            )
            assert isinstance(found, Solutions)
            for p, strength in enumerate(strengths):
                solutions[strength] = found.coef_PKD[p], found.intercept_PK[p]
                logits = features[held] @ found.coef_PKD[p].T + found.intercept_PK[p]
                entries[strength] = {"C": strength} | _measured(logits, target[held], held_weights)
                entries[strength]["iterations"] = int(found.iterations_P[p])

        def best() -> float:
            # of equally accurate ones the most probable: on an easy set every strength is right, few are confident
            def merit(strength: float) -> tuple[float, float]:
                entry = entries[strength]
                return (0.0 if self.multilabel_ else entry["accuracy"], -entry["cross_entropy"])

            return max(entries, key=merit)

        if adaptive:
            near, loss = None, np.inf
            for strength in COARSE:
                measure([strength], near)
                near, before, loss = strength, loss, entries[strength]["cross_entropy"]
                top = max(entry["accuracy"] for entry in entries.values())
                if loss > before and entries[strength]["accuracy"] < top:
                    break
            for step in FINE_STEPS:
                centre = best()
                measure([centre * 10**-step, centre * 10**step], centre)
        else:
            measure(grid)
        chosen = best()
        if len(grid) > 1 and not grid[0] < chosen < grid[-1]:
            side = "smallest" if chosen <= grid[0] else "largest"
            warnings.warn(
                f"probe: C: the best strength, {chosen:.3g}, is the {side} that was tried; the optimum may lie beyond: "
                f"give a grid that goes further",
                stacklevel=3,
            )
        self.curve_ = [entries[strength] for strength in sorted(entries)]
        return chosen, solutions[chosen]


def _share(right_N: NDArray[np.bool_], sample_weight: ArrayLike | None) -> float:
    if sample_weight is None:
        return float(right_N.mean())
    weights = sample_weights(None, sample_weight, np.zeros(len(right_N), np.int64), np.zeros(1))
    return float(np.average(right_N, weights=weights))


def _measured(
    logits_NK: NDArray[Any], target: NDArray[np.int64], weights: NDArray[np.float64] | None
) -> dict[str, float]:
    if target.ndim == 2:
        right = (logits_NK > 0) == target
        loss = -log_expit(np.where(target == 1, logits_NK, -logits_NK)).sum(axis=1)
    else:
        right = logits_NK.argmax(axis=1) == target
        loss = -np.take_along_axis(log_softmax(logits_NK, axis=1), target[:, None], axis=1)
    if weights is None:
        return {"accuracy": float(right.mean()), "cross_entropy": float(loss.mean())}
    accuracy = np.average(right.mean(axis=1) if right.ndim == 2 else right, weights=weights)
    return {"accuracy": float(accuracy), "cross_entropy": float(np.average(loss.reshape(-1), weights=weights))}


def _grid(C: Any) -> tuple[float, ...]:
    if isinstance(C, str):
        if C not in PRESETS:
            raise UserError(f"probe: C: '{C}' is unknown; use clip, dinov2, default, a number or several numbers")
        return PRESETS[C]
    grid = tuple(sorted({_positive(float(c)) for c in C}))
    if not grid:
        raise UserError("probe: C: the grid is empty; give at least one strength")
    return grid


def _positive(strength: float) -> float:
    if not (np.isfinite(strength) and strength > 0):
        raise UserError(f"probe: C: {strength} is not a positive number; give one such as 1.0")
    return float(strength)


def _split(target: NDArray[np.int64], share: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices to fit on and to compare on: of each class a share, at least one, but never its only sample.

    With several labels a sample, (N, K), a share of all samples.
    """
    if not 0 < share < 1:
        raise UserError(f"probe: validation: {share} is no share; give one between 0 and 1, such as 0.15")
    random = np.random.default_rng(seed)
    held: list[int] = []
    groups = [np.arange(len(target))]
    if target.ndim == 1:
        groups = [np.flatnonzero(target == label) for label in np.unique(target)]
    for members in groups:
        members = random.permutation(members)
        held.extend(members[: min(max(1, round(share * len(members))), len(members) - 1)])
    if not held:
        raise UserError("probe: C: no class has two samples to compare strengths on; give C as a number")
    mask = np.zeros(len(target), dtype=bool)
    mask[held] = True
    return np.flatnonzero(~mask), np.flatnonzero(mask)

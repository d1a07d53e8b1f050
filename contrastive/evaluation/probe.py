"""A linear classifier on frozen features: `LinearProbe`, its choice of strength, and its file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from scipy.special import log_softmax, softmax

from contrastive.errors import UserError
from contrastive.evaluation.softmax import SoftmaxRegression

COARSE = tuple(10.0**power for power in range(-4, 7, 2))
FINE_STEPS = (1.0, 0.5, 0.25)  # of a factor of ten: the ladder ends at a factor of 1.8
SWEEP_TOLERANCE = 1e-5  # enough to rank strengths; the refit goes on to `tol`


class LinearProbe:
    """Softmax regression on frozen features, the objective of scikit-learn's `LogisticRegression`.

    C * sum of cross-entropies + 1/2 |W|^2, the intercept free; the solution is the optimum itself, to `tol`.
    With two classes there are still two rows of weights, which equals scikit-learn's single one at 2 C.

    C: a number; a sequence of numbers to choose among; or None, a sweep from 1e-4 to 1e6, first in steps of a
        factor of 100, then halving the step around the best one down to a factor of 1.8. The coarse sweep stops
        when both accuracy and cross-entropy get worse: larger C only fit the noise more closely, and slowly.
    validation: share of the *training* samples, drawn class by class, that strengths are compared on.
        Afterwards the probe is fitted again to all of them. The better accuracy wins, at a tie the stronger
        penalty.
    seed: of that split.  tol, max_iter: of the final fit.

    Features are taken as they are: standardising them would change the optimum.

    Learned: `coef_ (classes, dim)`, `intercept_ (classes,)` (float64), `classes_`, `C_`,
    `validation_curve_` (list of `(C, accuracy)` in order of C; empty when C is a number), `metadata_`.
    """

    def __init__(
        self,
        C: float | Sequence[float] | None = None,
        *,
        validation: float = 0.15,
        seed: int = 0,
        tol: float = 1e-8,
        max_iter: int = 1000,
    ) -> None:
        self.C, self.validation, self.seed, self.tol, self.max_iter = C, validation, seed, tol, max_iter

    def fit(self, X: ArrayLike, y: ArrayLike) -> LinearProbe:
        """Fit to features X (n, dim) and labels y (n,), strings or integers.

        Raises `UserError` for non-finite features, fewer than two classes, a C that is not positive, or
        lengths that differ.
        """
        features, labels = _features(X), np.asarray(y)
        if len(features) != len(labels):
            raise UserError(f"probe: {len(features)} feature rows but {len(labels)} labels")
        self.classes_, target = np.unique(labels, return_inverse=True)
        if len(self.classes_) < 2:
            found = ", ".join(map(str, self.classes_)) or "none"
            raise UserError(
                f"probe: needs at least two classes, the training labels have {len(self.classes_)}: {found}"
            )
        self.metadata_: dict[str, Any] = {}
        self.validation_curve_: list[tuple[float, float]] = []
        if self.C is not None and np.ndim(self.C) == 0:
            self.C_, near = _positive(float(self.C)), None  # type: ignore[arg-type]
        else:
            self.C_, near = self._choose(features, target)
        problem = SoftmaxRegression(features, target, len(self.classes_))
        if near is not None:
            problem.start_at(*near)
        self.coef_, self.intercept_ = problem.solve(self.C_, tolerance=self.tol, max_iter=self.max_iter)
        return self

    def decision_function(self, X: ArrayLike) -> NDArray[np.float64]:
        """Logits (n, classes). Raises `UserError` for another width than the probe was fitted to."""
        features = _features(X)
        if features.shape[1] != self.coef_.shape[1]:
            raise UserError(
                f"probe: features have width {features.shape[1]}, the probe was fitted to "
                f"{self.coef_.shape[1]}; use the model and the kind of features that it was fitted with"
            )
        return features @ self.coef_.T + self.intercept_

    def predict_proba(self, X: ArrayLike) -> NDArray[np.float64]:
        """Probabilities (n, classes), in the order of `classes_`."""
        return softmax(self.decision_function(X), axis=1)

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """The likeliest class of each row, (n,)."""
        return self.classes_[self.decision_function(X).argmax(axis=1)]

    def score(self, X: ArrayLike, y: ArrayLike) -> float:
        """Share of the rows whose predicted class is `y`."""
        return float((self.predict(X) == np.asarray(y)).mean())

    def save(self, path: str | Path, **metadata: Any) -> None:
        """Write one safetensors file: weights, and a JSON header with classes, C, the curve and `metadata`.

        metadata: what the user of the file must know, such as the model and the kind of features.
        """
        header = {
            "format": "contrastive.LinearProbe/1",
            "classes": self.classes_.tolist(),
            "C": self.C_,
            "validation_curve": self.validation_curve_,
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
        probe = cls(C=header["C"])
        probe.coef_, probe.intercept_ = coef, intercept
        probe.classes_, probe.C_ = np.asarray(header["classes"]), header["C"]
        probe.validation_curve_ = [(c, accuracy) for c, accuracy in header["validation_curve"]]
        probe.metadata_ = header["metadata"]
        return probe

    def _choose(self, features: NDArray[Any], target: NDArray[np.int64]) -> tuple[float, tuple[Any, Any]]:
        """The best strength on the validation split, and the solution there."""
        fitted, held = _split(target, self.validation, self.seed)
        problem = SoftmaxRegression(features[fitted], target[fitted], len(self.classes_))
        accuracy: dict[float, float] = {}
        losses: dict[float, float] = {}
        solutions: dict[float, tuple[Any, Any]] = {}

        def measure(strength: float) -> float:
            if solutions:  # the nearest strength has the nearest solution
                nearest = min(solutions, key=lambda other: abs(np.log(other / strength)))
                problem.start_at(*solutions[nearest])
            coef, intercept = solutions[strength] = problem.solve(
                strength, tolerance=SWEEP_TOLERANCE, max_iter=self.max_iter, dtype=np.float32
            )
            logits = features[held] @ coef.T + intercept
            accuracy[strength] = float((logits.argmax(axis=1) == target[held]).mean())
            losses[strength] = float(-log_softmax(logits, axis=1)[np.arange(len(held)), target[held]].mean())
            return losses[strength]

        def best() -> float:
            # of equally accurate ones the most probable: on an easy set every strength is right, few are confident
            return max(accuracy, key=lambda strength: (accuracy[strength], -losses[strength]))

        if self.C is not None:
            for strength in sorted(_positive(float(c)) for c in self.C):  # type: ignore[union-attr]
                measure(strength)
        else:
            loss = np.inf
            for strength in COARSE:
                before, loss = loss, measure(strength)
                if loss > before and accuracy[strength] < max(accuracy.values()):
                    break
            for step in FINE_STEPS:
                centre = best()
                for strength in (centre * 10**-step, centre * 10**step):
                    measure(strength)
        if not accuracy:
            raise UserError("probe: C: the grid is empty; give at least one strength")
        self.validation_curve_ = sorted(accuracy.items())
        return best(), solutions[best()]


def _features(X: ArrayLike) -> NDArray[np.floating]:
    if hasattr(X, "detach"):  # a torch tensor, perhaps on another device
        X = X.detach().cpu().float().numpy()
    features = np.asarray(X)
    if features.ndim != 2:
        raise UserError(f"probe: features must have shape (n, dim), got {features.shape}")
    bad = ~np.isfinite(features).all(axis=1)
    if bad.any():
        raise UserError(
            f"probe: features: {bad.sum()} of {len(features)} rows are not finite, the first is "
            f"row {bad.argmax()}; leave them out"
        )
    return features


def _positive(strength: float) -> float:
    if not (np.isfinite(strength) and strength > 0):
        raise UserError(f"probe: C: {strength} is not a positive number")
    return float(strength)


def _split(target: NDArray[np.int64], share: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices to fit on and to compare on: of each class a share, at least one, but never its only sample."""
    random = np.random.default_rng(seed)
    held: list[int] = []
    for label in np.unique(target):
        members = random.permutation(np.flatnonzero(target == label))
        held.extend(members[: min(max(1, round(share * len(members))), len(members) - 1)])
    if not held:
        raise UserError("probe: C: no class has two samples to compare strengths on; give C as a number")
    mask = np.zeros(len(target), dtype=bool)
    mask[held] = True
    return np.flatnonzero(~mask), np.flatnonzero(mask)

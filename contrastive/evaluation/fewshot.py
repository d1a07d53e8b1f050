"""Few-shot classification on frozen features: a few training images a class, drawn again for every seed.

Shapes: N training and M test images, D, K classes, G seeds, S shots of each class, F folds, P problems.
Nothing but the shots is looked at before the test images: strengths are chosen by leaving shots out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import log_softmax
from scipy.stats import t as student

from contrastive.errors import UserError
from contrastive.evaluation.checks import check_class_numbers
from contrastive.evaluation.estimator import check_features
from contrastive.evaluation.metrics import share
from contrastive.evaluation.softmax import SoftmaxRegression

Array = NDArray[np.float64]

SHOTS = (1, 2, 4, 8, 16)
FOLDS = 4  # at most; with fewer shots every shot is left out once
PROBE_STRENGTHS = tuple(10.0**power for power in np.arange(-1, 5.1, 1))
ANCHORED_STRENGTHS = tuple(10.0**power for power in np.arange(-3, 4.1, 1))
CACHE = tuple((alpha, beta) for beta in (1.0, 2.0, 5.5, 10.0) for alpha in (0.1, 0.3, 1.0, 3.0, 10.0))
# With one shot nothing can be left out. For the cache the values of its authors; for the others a guess made once,
# before any test set was looked at.
PROBE_AT_ONE, ANCHORED_AT_ONE, CACHE_AT_ONE = 100.0, 1.0, (1.0, 5.5)


def few_shot(
    train_ND: ArrayLike,
    train_target_N: ArrayLike,
    test_MD: ArrayLike,
    test_target_M: ArrayLike,
    text_DK: ArrayLike | None = None,
    *,
    shots: Sequence[int] = SHOTS,
    seeds: int = 10,
    scale: float = 100.0,
) -> list[dict[str, Any]]:
    """Accuracy on the test images after 1, 2, 4, … training images a class, by several methods.

    Methods:
        "probe": softmax regression, as `LinearProbe`.
        "anchored": `anchored_path`, softmax regression that starts from, and is drawn to, the zero-shot classifier.
        "prototypes": the nearest mean of a class's shots, by cosine.
        "tip-adapter": zero-shot logits + alpha * sum over shots of exp(-beta (1 - cosine)) (Zhang et al. 2022,
        training-free).
        "zero-shot" (shots 0): text alone. It, "anchored" and "tip-adapter" need text_DK.

    Args:
        features: rows, normalised here. targets: class numbers from 0. text_DK: a column a class, normalised here.
        seeds: draws; the shots of a seed are nested, 2 contain 1. scale: of the text's logits; 100 is CLIP's.

    Returns:
        One dict a (method, shots): `{"method", "shots", "top1": {"value", "low", "high"}, "per_seed", "strengths",
        "tuned"}`. top1 is the mean over seeds with Student's 95 % interval of it: it tells how the draw of the shots
        matters, not how the test images were drawn; that of "zero-shot", which draws nothing, is the bootstrap over
        test images. strengths: what each seed chose (C, or (alpha, beta)), on its shots only. tuned: False for one
        shot, where nothing can be left out and fixed values are taken.

    Raises:
        UserError: a class with fewer training images than shots, targets without a text, fewer than two seeds.
    """
    train, test = _normalised(train_ND, "train"), _normalised(test_MD, "test")
    train_target, test_target = (check_class_numbers(y, "few_shot") for y in (train_target_N, test_target_M))
    text = None if text_DK is None else _normalised(np.asarray(text_DK).T, "text").T
    classes = text.shape[1] if text is not None else int(train_target.max()) + 1
    _check(train, train_target, test, test_target, text, classes, shots, seeds)
    order_GKS = _draw(train_target, classes, max(shots), seeds)
    result = []
    prior_MK = None if text is None else scale * (test @ text)
    if prior_MK is not None:
        right = prior_MK.argmax(axis=1) == test_target
        zero = {"method": "zero-shot", "shots": 0, "top1": share(right), "per_seed": [float(right.mean())]}
        result.append(zero | {"strengths": [], "tuned": False})
    for count in sorted(set(shots)):
        chosen_GN = order_GKS[:, :, :count].transpose(0, 2, 1).reshape(seeds, -1)  # shot by shot, each all classes
        shot_GND = train[chosen_GN]
        target_N = np.tile(np.arange(classes), count)
        methods: dict[str, Callable[[], tuple[list[Array], list[Any]]]] = {
            "probe": lambda x=shot_GND, y=target_N: _regress(x, y, test, None, None),  # type: ignore[misc]
            "prototypes": lambda x=shot_GND: _prototypes(x, test, classes),  # type: ignore[misc]
        }
        if text is not None and prior_MK is not None:
            prior_GNK = scale * (shot_GND @ text)
            methods["anchored"] = lambda x=shot_GND, y=target_N, p=prior_GNK: (  # type: ignore[misc]
                _regress(x, y, test, p, prior_MK)
            )
            methods["tip-adapter"] = lambda x=shot_GND, y=target_N, p=prior_GNK: (  # type: ignore[misc]
                _cache(x, y, p, test, prior_MK)
            )
        for name, method in methods.items():
            logits, strengths = method()
            per_seed = [float((scores.argmax(axis=1) == test_target).mean()) for scores in logits]
            entry = {"method": name, "shots": count, "top1": _over_seeds(per_seed), "per_seed": per_seed}
            result.append(entry | {"strengths": strengths, "tuned": bool(strengths) and count > 1})
    return result


def anchored_path(
    features: ArrayLike, target: ArrayLike, prior: ArrayLike, strengths: Sequence[float], *, tolerance: float = 1e-8
) -> tuple[Array, Array]:
    """Minimise CE(prior + X V' + b) + (|V|^2 + b^2) / (2 C) of each C: weights V (P, K, D) and b (P, K).

    The text-anchored probe: `prior` (N, K) are the logits of the zero-shot classifier, s X T'. 1 / C is its lambda:
    C -> 0 leaves V = 0, which *is* zero-shot; C -> infinity forgets the text. CE is the sum over samples. With groups
    of samples, features (G, N, D), target (G, N), prior (G, N, K), the results have G in front.
    """
    problem, classes = np.asarray(features), np.asarray(prior).shape[-1]
    regression = SoftmaxRegression(problem, np.asarray(target), classes, offset=np.asarray(prior), free_intercept=False)
    found = regression.solve(strengths, tolerance=tolerance)
    if isinstance(found, list):
        return np.stack([one.coef_PKD for one in found]), np.stack([one.intercept_PK for one in found])
    return found.coef_PKD, found.intercept_PK


def _regress(
    shot_GND: Array, target_N: NDArray[np.int64], test: Array, prior_GNK: Array | None, prior_MK: Array | None
) -> tuple[list[Array], list[Any]]:
    """Test logits of each seed, at the strength that its folds chose; every seed, strength and fold in one batch."""
    seeds, samples, _ = shot_GND.shape
    classes = int(target_N.max()) + 1
    shots = samples // classes
    grid = PROBE_STRENGTHS if prior_GNK is None else ANCHORED_STRENGTHS
    at_one = PROBE_AT_ONE if prior_GNK is None else ANCHORED_AT_ONE
    problem = SoftmaxRegression(
        shot_GND,
        np.tile(target_N, (seeds, 1)),
        classes,
        offset=prior_GNK,
        free_intercept=prior_GNK is None,  # a free one would leave the text at once
    )
    if shots == 1:
        grid, picked = (at_one,), [0] * seeds
    else:
        fold_N = _folds(shots, classes)
        folds = int(fold_N.max()) + 1
        which_P = np.tile(np.arange(folds), len(grid))
        kept_NP = (fold_N[:, None] != which_P).astype(np.float64)
        found = problem.solve(
            np.repeat(grid, folds).tolist(),
            weight=np.broadcast_to(kept_NP, (seeds, *kept_NP.shape)),
            tolerance=1e-4,
            max_iter=300,
            polish=False,
        )
        assert isinstance(found, list)
        picked = []
        for seed, one in enumerate(found):
            logits_SNK = np.empty((len(grid), samples, classes))
            for p, fold in enumerate(which_P):
                out = fold_N == fold
                logits = shot_GND[seed, out] @ one.coef_PKD[p].T + one.intercept_PK[p]
                logits_SNK[p // folds, out] = logits if prior_GNK is None else logits + prior_GNK[seed, out]
            picked.append(_best(logits_SNK, target_N))
    chosen = sorted(set(picked))  # by any seed
    whole = problem.solve([grid[p] for p in chosen], tolerance=1e-5, polish=False)
    assert isinstance(whole, list)
    logits = [
        test @ one.coef_PKD[chosen.index(p)].T + one.intercept_PK[chosen.index(p)]
        for one, p in zip(whole, picked, strict=True)
    ]
    if prior_MK is not None:
        logits = [one + prior_MK for one in logits]
    return logits, [float(grid[p]) for p in picked]


def _prototypes(shot_GND: Array, test: Array, classes: int) -> tuple[list[Array], list[Any]]:
    seeds, samples, width = shot_GND.shape
    mean_GKD = shot_GND.reshape(seeds, samples // classes, classes, width).mean(axis=1)
    return [test @ _unit(mean_KD).T for mean_KD in mean_GKD], []


def _cache(
    shot_GND: Array, target_N: NDArray[np.int64], prior_GNK: Array, test: Array, prior_MK: Array
) -> tuple[list[Array], list[Any]]:
    """Tip-Adapter: keys are the shots, values their classes; a shot that is left out asks the other folds."""
    classes = int(target_N.max()) + 1
    shots = len(target_N) // classes
    own_NK = np.eye(classes)[target_N]
    logits, strengths = [], []
    for shot_ND, prior_NK in zip(shot_GND, prior_GNK, strict=True):
        if shots == 1:
            alpha, beta = CACHE_AT_ONE
        else:
            fold_N = _folds(shots, classes)
            other_NN = fold_N[:, None] != fold_N
            near_NN = shot_ND @ shot_ND.T - 1
            tried = [prior_NK + a * ((np.exp(b * near_NN) * other_NN) @ own_NK) for a, b in CACHE]
            alpha, beta = CACHE[_best(np.stack(tried), target_N)]
        logits.append(prior_MK + alpha * (np.exp(beta * (test @ shot_ND.T - 1)) @ own_NK))
        strengths.append((alpha, beta))
    return logits, strengths


def _folds(shots: int, classes: int) -> NDArray[np.int64]:
    """The fold of each sample, shot by shot: every fold leaves out the same number of each class, but for one."""
    return np.repeat(np.arange(shots) % min(shots, FOLDS), classes)


def _best(logits_SNK: Array, target_N: NDArray[np.int64]) -> int:
    """The most accurate setting; of equally accurate ones that with the smallest cross-entropy."""
    right_S = (logits_SNK.argmax(axis=2) == target_N).mean(axis=1)
    loss_S = -log_softmax(logits_SNK, axis=2)[:, np.arange(len(target_N)), target_N].mean(axis=1)
    return int(np.lexsort((loss_S, -right_S))[0])


def _over_seeds(values: Sequence[float]) -> dict[str, float]:
    mean, count = float(np.mean(values)), len(values)
    half = float(student.ppf(0.975, count - 1) * np.std(values, ddof=1) / np.sqrt(count))
    return {"value": mean, "low": max(0.0, mean - half), "high": min(1.0, mean + half)}


def _draw(target_N: NDArray[Any], classes: int, most: int, seeds: int) -> NDArray[np.int64]:
    """Image numbers (G, K, most), drawn without replacement."""
    members = [np.flatnonzero(target_N == k) for k in range(classes)]
    draws = [np.random.default_rng(seed) for seed in range(seeds)]
    return np.stack([[random.permutation(rows)[:most] for rows in members] for random in draws])


def _check(
    train: Array,
    train_target: NDArray[Any],
    test: Array,
    test_target: NDArray[Any],
    text: Array | None,
    classes: int,
    shots: Sequence[int],
    seeds: int,
) -> None:
    for name, rows, target in (("train", train, train_target), ("test", test, test_target)):
        if target.shape != (len(rows),):
            raise UserError(f"few-shot: {name}: {len(rows)} feature rows but targets of shape {target.shape}")
        if len(target) and not 0 <= target.min() <= target.max() < classes:
            raise UserError(f"few-shot: {name}: targets go to {target.max()}, but there are {classes} classes")
    widths = {train.shape[1], test.shape[1], *(() if text is None else (text.shape[0],))}
    if len(widths) > 1 or not len(test):
        raise UserError(f"few-shot: {len(test)} test images, widths {sorted(widths)}; embed all with one model")
    if classes < 2:
        raise UserError(f"few-shot: needs at least two classes, got {classes}")
    if not shots or min(shots) < 1 or seeds < 2:
        raise UserError(f"few-shot: shots {list(shots)}, seeds {seeds}: needs shots >= 1 and at least 2 seeds")
    counts = np.bincount(train_target, minlength=classes)
    if counts.min() < max(shots):
        least = int(counts.argmin())
        raise UserError(
            f"few-shot: class {least} has {counts[least]} training images, {max(shots)} shots need {max(shots)}; "
            "leave the class out or ask for fewer shots"
        )


def _normalised(rows: ArrayLike, name: str) -> Array:
    return _unit(check_features(rows, f"few-shot: {name}").astype(np.float64))


def _unit(rows: Array) -> Array:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)

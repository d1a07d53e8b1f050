"""Weights of classes and samples in the linear probe; the oracle is scikit-learn's LogisticRegression."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.utils.class_weight import compute_sample_weight

from contrastive.errors import UserError
from contrastive.evaluation import LinearProbe
from contrastive.evaluation.class_weights import sample_weights
from contrastive.evaluation.probe import _measured
from contrastive.evaluation.softmax import SoftmaxRegression


def imbalanced(classes, width=6, seed=0):
    """Rows of `classes` overlapping classes, each twice as large as the next."""
    random = np.random.default_rng(seed)
    counts = [80 // 2**number + 5 for number in range(classes)]
    target = np.repeat(np.arange(classes), counts)
    return random.normal(size=(classes, width))[target] + random.normal(size=(len(target), width)), target


def oracle(features, target, strength, *, class_weight=None, sample_weight=None):
    # two rows of weights with their own penalties are scikit-learn's one at twice the strength
    scale = 2 if len(np.unique(target)) == 2 else 1
    fitted = LogisticRegression(C=scale * strength, tol=1e-12, max_iter=100_000, class_weight=class_weight)
    return fitted.fit(features, target, sample_weight=sample_weight)


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("strength", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("kind", ["balanced", "dict", "samples", "both"])
def test_a_weighted_probe_equals_scikit_learn(classes, strength, kind):
    features, target = imbalanced(classes)
    own = np.random.default_rng(1).uniform(0, 3, len(target)) if kind in ("samples", "both") else None
    by_class = {"balanced": "balanced", "dict": {0: 0.5, 1: 4.0}, "samples": None, "both": "balanced"}[kind]
    probe = LinearProbe(strength, tol=1e-12, class_weight=by_class).fit(features, target, sample_weight=own)
    expected = oracle(features, target, strength, class_weight=by_class, sample_weight=own)
    np.testing.assert_allclose(probe.predict_proba(features), expected.predict_proba(features), atol=1e-4)
    coef = probe.coef_[[1]] - probe.coef_[[0]] if classes == 2 else probe.coef_
    np.testing.assert_allclose(coef, expected.coef_, atol=1e-3, rtol=1e-3)  # both stop at a small gradient


def test_features_wider_than_the_samples_are_weighted_alike():
    features, target = imbalanced(3, width=200)
    probe = LinearProbe(0.1, tol=1e-12, class_weight="balanced").fit(features, target)
    expected = oracle(features, target, 0.1, class_weight="balanced")
    np.testing.assert_allclose(probe.predict_proba(features), expected.predict_proba(features), atol=1e-4)


@settings(deadline=None, max_examples=8)
@given(st.lists(st.integers(0, 3), min_size=40, max_size=40), st.sampled_from([0.03, 3.0]))
def test_a_whole_weight_is_a_repetition_and_zero_leaves_out(weights, strength):
    features, target = imbalanced(2)
    features, target = features[60:100], target[60:100]
    weights = np.asarray(weights)
    weights[[0, -1]] = 1  # both classes stay
    probe = LinearProbe(strength, tol=1e-12).fit(features, target, sample_weight=weights)
    repeated = np.repeat(np.arange(len(target)), weights)
    plain = LinearProbe(strength, tol=1e-12).fit(features[repeated], target[repeated])
    np.testing.assert_allclose(probe.predict_proba(features), plain.predict_proba(features), atol=1e-5)


def test_weights_of_one_change_nothing():
    features, target = imbalanced(3)
    plain = LinearProbe([0.1, 10.0]).fit(features, target)
    weighted = LinearProbe([0.1, 10.0]).fit(features, target, sample_weight=np.ones(len(target)))
    assert plain.C_ == weighted.C_
    np.testing.assert_allclose(plain.predict_proba(features), weighted.predict_proba(features), atol=1e-5)


def test_side_by_side_problems_take_the_weights_too():
    features, target = imbalanced(3)
    own = np.random.default_rng(1).uniform(0.1, 3, len(target))
    problem = SoftmaxRegression(features, target, 3, sample_weight=own)
    path, batch = (problem.solve([0.1, 1.0], tolerance=1e-12, precondition=which) for which in (True, False))
    np.testing.assert_allclose(path.coef_PKD, batch.coef_PKD, atol=1e-4)
    np.testing.assert_allclose(path.objective_P, batch.objective_P, rtol=1e-8)


def test_several_labels_a_sample_are_weighted_by_sample():
    features, target = imbalanced(3)
    truth = np.stack([target == 1, target >= 1], axis=1).astype(int)
    own = np.random.default_rng(1).uniform(0.1, 3, len(target))
    probe = LinearProbe(1.0, tol=1e-12).fit(features, truth, sample_weight=own)
    for column in range(2):
        expected = LogisticRegression(C=1.0, tol=1e-12, max_iter=100_000).fit(features, truth[:, column], own)
        np.testing.assert_allclose(
            probe.predict_proba(features)[:, column], expected.predict_proba(features)[:, 1], atol=1e-4
        )


def test_strengths_are_compared_by_the_weights_of_the_fit():
    """A guess of the commonest class has half of a balanced accuracy, whatever the sizes."""
    target = np.repeat([0, 1], [90, 10])
    weights = sample_weights("balanced", None, target, np.arange(2))
    guess = np.tile([1.0, 0.0], (100, 1))
    assert _measured(guess, target, None)["accuracy"] == 0.9
    assert _measured(guess, target, weights)["accuracy"] == pytest.approx(0.5)


def test_balanced_weights_are_scikit_learns():
    _, target = imbalanced(4)
    found = sample_weights("balanced", None, target, np.arange(4))
    np.testing.assert_allclose(found, compute_sample_weight("balanced", target))


def test_the_score_is_weighted():
    features, target = imbalanced(2)
    probe = LinearProbe(1.0).fit(features, target)
    own = np.random.default_rng(1).uniform(0, 3, len(target))
    right = probe.predict(features) == target
    assert probe.score(features, target, sample_weight=own) == pytest.approx(np.average(right, weights=own))


@pytest.mark.parametrize("weight", [None, "balanced", {"rare": 3.0, "usual": 0.5}])
def test_the_file_keeps_the_class_weight(tmp_path, weight):
    features, target = imbalanced(2)
    labels = np.asarray(["usual", "rare"])[target]
    probe = LinearProbe(1.0, class_weight=weight).fit(features, labels)
    probe.save(tmp_path / "probe.safetensors")
    opened = LinearProbe.load(tmp_path / "probe.safetensors")
    assert opened.class_weight == weight
    np.testing.assert_array_equal(opened.predict_proba(features), probe.predict_proba(features))


@pytest.mark.parametrize(
    ("by_class", "by_sample", "message"),
    [
        ("heavy", None, "'heavy' is unknown; use balanced"),
        (3.0, None, "a float is given"),
        ({"cat": 1}, None, "no such class: 'cat'"),
        ({0: 0.0}, None, "0 weighs 0.0; give a positive number"),
        ({0: -1}, None, "positive number"),
        ({1: float("nan")}, None, "positive number"),
        ({1: "2"}, None, "positive number"),
        (None, lambda n: np.ones(n - 1), "weights for"),
        (None, lambda n: np.ones((n, 1)), "1D"),
        (None, lambda n: -np.ones(n), "row 0 weighs -1"),
        (None, lambda n: np.full(n, np.nan), "row 0 weighs nan"),
        (None, lambda n: np.zeros(n), "all weights are zero"),
        (None, lambda n: ["a"] * n, "not numbers"),
        (None, lambda n: np.r_[np.ones(85), np.zeros(n - 85)], "class 1 has no weight"),
    ],
)
def test_weights_that_cannot_be_meant_are_one_line(by_class, by_sample, message):
    features, target = imbalanced(2)
    with pytest.raises(UserError, match=message) as raised:
        LinearProbe(1.0, class_weight=by_class).fit(
            features, target, sample_weight=None if by_sample is None else by_sample(len(target))
        )
    assert "\n" not in str(raised.value)


def test_a_class_weight_with_several_labels_a_sample_is_refused():
    features, target = imbalanced(3)
    with pytest.raises(UserError, match="one label a sample"):
        LinearProbe(1.0, class_weight="balanced").fit(features, np.stack([target == 1, target == 2], axis=1))


def test_extreme_weights_end_at_the_optimum():
    features, target = imbalanced(2)
    own = np.where(np.arange(len(target)) % 2, 1e-4, 1e4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        probe = LinearProbe(1.0, tol=1e-10).fit(features, target, sample_weight=own)
    logits = probe.logits(features)
    chance = np.exp(logits - logits.max(axis=1, keepdims=True))
    chance /= chance.sum(axis=1, keepdims=True)
    gradient = (own[:, None] * (chance - np.eye(2)[target])).T @ features + probe.coef_
    assert np.linalg.norm(gradient) ** 2 / 2 < 1e-5 * own.sum()

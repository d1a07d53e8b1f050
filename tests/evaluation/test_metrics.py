import numpy as np
import pytest

from contrastive.evaluation.metrics import accuracies, class_ranks, mean_per_class, share


def test_ranks_count_ties_and_nan_against_the_model():
    scores = [[1.0, 2.0, 0.0], [1.0, 1.0, 1.0], [np.nan, 0.0, 0.0], [0.0, 5.0, np.nan]]
    assert class_ranks(scores, [1, 0, 0, 1]).tolist() == [0, 2, 2, 1]


def test_a_collapsed_model_has_accuracy_zero():
    found = accuracies(class_ranks(np.zeros((50, 10)), np.arange(50) % 10), np.arange(50) % 10, 10)
    assert found["top1"]["value"] == found["top5"]["value"] == 0.0


def test_accuracies_agree_with_scikit_learn():
    from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

    random = np.random.default_rng(0)
    scores, target = random.normal(size=(300, 7)), np.r_[np.arange(7), random.integers(0, 3, 293)]
    found = accuracies(class_ranks(scores, target), target, 7)
    assert found["top1"]["value"] == pytest.approx(top_k_accuracy_score(target, scores, k=1))
    assert found["top5"]["value"] == pytest.approx(top_k_accuracy_score(target, scores, k=5))
    balanced = balanced_accuracy_score(target, scores.argmax(axis=1))
    assert found["mean_per_class"]["value"] == pytest.approx(balanced)
    assert found["top5"]["chance"] == pytest.approx(5 / 7)


def test_intervals_agree_with_a_bootstrap_that_redraws_samples():
    random = np.random.default_rng(1)
    target = np.repeat([0, 1, 2], [150, 40, 10])
    right = random.random(200) < np.array([0.9, 0.5, 0.2])[target]
    drawn, per_class = [], []
    for _ in range(4000):
        rows = random.integers(0, 200, 200)
        drawn.append(right[rows].mean())
        classes = [right[rows][target[rows] == c] for c in range(3)]
        per_class.append(np.mean([found.mean() for found in classes if len(found)]))
    for found, oracle in ((share(right), drawn), (mean_per_class(right, target), per_class)):
        low, high = np.quantile(oracle, [0.025, 0.975])
        assert found["low"] == pytest.approx(low, abs=0.02) and found["high"] == pytest.approx(high, abs=0.02)


def test_intervals_are_the_same_for_the_same_seed():
    right = np.arange(100) % 3 == 0
    assert share(right, seed=4) == share(right, seed=4) != share(right, seed=5)


def test_a_top_k_that_is_always_right_is_left_out():
    assert set(accuracies(np.array([0, 1]), np.array([0, 1]), 2)) == {"top1", "mean_per_class"}

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.neighbors import KNeighborsClassifier

from contrastive.errors import UserError
from contrastive.evaluation import knn
from contrastive.evaluation.knn import knn_sweep, neighbours
from contrastive.evaluation.ridge import ridge_path


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def data(train=200, test=80, width=8, classes=3, seed=0):
    random = np.random.default_rng(seed)
    centre = random.normal(size=(classes, width))
    target, test_target = random.integers(0, classes, train), random.integers(0, classes, test)
    draw = lambda labels: unit(centre[labels] + 1.2 * random.normal(size=(len(labels), width)))  # noqa: E731
    return draw(target), target, draw(test_target), test_target


def oracle(temperature, k):
    """Cosine distance 1 - s, so exp(s / T) is exp(-distance / T) but for a constant."""
    weights = lambda distance: np.exp(-distance / temperature)  # noqa: E731
    return KNeighborsClassifier(k, weights=weights, metric="cosine", algorithm="brute")


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 1.0)])
def test_the_test_accuracy_is_scikit_learns(k, temperature):
    train, target, test, test_target = data()
    found = knn_sweep(train, target, test, test_target, ks=[k], temperatures=[temperature])
    expected = oracle(temperature, k).fit(train, target).score(test, test_target)
    assert found["top1"]["value"] == pytest.approx(expected)


def test_the_grid_is_leave_one_out_on_the_validation_part():
    train, target, test, test_target = data()
    found = knn_sweep(train, target, test, test_target, ks=[1, 7, 30], temperatures=[0.05, 0.5], seed=4)
    held = np.random.default_rng(4).permutation(200)[:20]
    assert len(found["grid"]) == 6
    for entry in found["grid"]:
        right = 0
        for row in held:
            others = np.arange(200) != row
            fitted = oracle(entry["temperature"], entry["k"]).fit(train[others], target[others])
            right += fitted.predict(train[[row]])[0] == target[row]
        assert entry["accuracy"] == pytest.approx(right / 20)


def test_the_pair_chosen_is_the_best_of_the_grid_whatever_the_test_says():
    train, target, test, test_target = data()
    found = knn_sweep(train, target, test, test_target)
    best = max(entry["accuracy"] for entry in found["grid"])
    (chosen,) = [e for e in found["grid"] if (e["k"], e["temperature"]) == (found["k"], found["temperature"])]
    assert chosen["accuracy"] == best == found["validation"]["value"]
    other = knn_sweep(train, target, -test, (test_target + 1) % 3)
    assert (other["k"], other["temperature"]) == (found["k"], found["temperature"])


def test_neighbours_over_blocks_are_those_of_a_whole_sort(monkeypatch):
    monkeypatch.setattr(knn, "KEYS", 37)
    monkeypatch.setattr(knn, "QUERIES", 11)
    train, query = (torch.as_tensor(part) for part in data()[::2])
    itself = torch.arange(80)
    similarity, index = neighbours(train, query, 50, itself)
    whole = query @ train.T
    whole[torch.arange(80), itself] = -torch.inf
    values = whole.sort(dim=1, descending=True).values[:, :50]
    torch.testing.assert_close(similarity, values)
    # products of blocks round otherwise: two keys as similar as that may change places
    torch.testing.assert_close(whole.gather(1, index), values)
    assert all(len(set(row)) == 50 for row in index.tolist())


def test_a_sharp_temperature_does_not_overflow():
    train, target, test, test_target = data()
    found = knn_sweep(train, target, test, test_target, ks=[50], temperatures=[1e-4])
    nearest = KNeighborsClassifier(1, metric="cosine", algorithm="brute").fit(train, target)
    assert found["top1"]["value"] == pytest.approx(nearest.score(test, test_target))


def test_a_k_beyond_the_training_images_is_left_out():
    train, target, test, test_target = data(train=30)
    assert max(entry["k"] for entry in knn_sweep(train, target, test, test_target)["grid"]) == 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, b, c, d: (a[:, :4], b, c, d), "width 4, test 8"),
        (lambda a, b, c, d: (a, b[:-1], c, d), "200 feature rows"),
        (lambda a, b, c, d: (a[:1], b[:1], c, d), "at least 2"),
        (lambda a, b, c, d: (a * np.nan, b, c, d), "row 0"),
        (lambda a, b, c, d: (a, b - 5, c, d), "negative"),
    ],
)
def test_what_cannot_be_searched_is_told(change, message):
    with pytest.raises(UserError, match=message):
        knn_sweep(*change(*data()))


@pytest.mark.parametrize("width", [8, 400], ids=["more samples", "more features"])
def test_ridge_of_every_penalty_is_scikit_learns(width):
    random = np.random.default_rng(0)
    features = random.normal(size=(120, width)) * np.logspace(-1, 1, width) + 3
    target = np.eye(3)[random.integers(0, 3, 120)]
    penalties = [1e-2, 1.0, 1e3]
    coef, intercept = ridge_path(features, target, penalties)
    for p, penalty in enumerate(penalties):
        other = Ridge(penalty, solver="svd").fit(features, target)
        np.testing.assert_allclose(coef[p], other.coef_, atol=1e-8)
        np.testing.assert_allclose(intercept[p], other.intercept_, atol=1e-6)


@pytest.mark.parametrize("penalty", [0.0, -1.0, np.nan])
def test_a_penalty_must_be_positive(penalty):
    with pytest.raises(UserError, match="penalties"):
        ridge_path(np.ones((4, 2)), np.ones((4, 1)), [1.0, penalty])

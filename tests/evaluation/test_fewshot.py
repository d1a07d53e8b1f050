import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestCentroid

from contrastive.errors import UserError
from contrastive.evaluation import fewshot
from contrastive.evaluation.fewshot import anchored_path, few_shot

CLASSES, WIDTH = 4, 12


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def data(noise=1.0, train=20, test=50, seed=0):
    """Features around a centre a class, and texts that are rough copies of the centres."""
    random = np.random.default_rng(seed)
    centre = random.normal(size=(CLASSES, WIDTH))

    def draw(count):
        target = np.tile(np.arange(CLASSES), count)
        return unit(centre[target] + noise * random.normal(size=(len(target), WIDTH))), target

    text_DK = unit(centre + 0.5 * random.normal(size=centre.shape)).T
    return *draw(train), *draw(test), text_DK


def by(entries, method, shots):
    (found,) = [entry for entry in entries if (entry["method"], entry["shots"]) == (method, shots)]
    return found


def test_the_anchored_probe_without_freedom_is_zero_shot():
    features, target, test, _, text = data()
    coef, intercept = anchored_path(features, target, 100 * features @ text, [1e-9])
    prior = 100 * test @ text
    np.testing.assert_allclose(
        softmax(prior + test @ coef[0].T + intercept[0], axis=1), softmax(prior, axis=1), atol=1e-5
    )


def test_the_anchored_probe_with_freedom_forgets_the_text():
    features, target, *_, text = data(noise=2.0)
    prior = 5 * features @ text
    coef, intercept = anchored_path(features, target, prior, [1e5], tolerance=1e-12)
    free = LogisticRegression(C=np.inf, tol=1e-10, max_iter=50_000).fit(features, target)
    ours = softmax(prior + features @ coef[0].T + intercept[0], axis=1)
    np.testing.assert_allclose(ours, free.predict_proba(features), atol=2e-3)


def test_the_anchored_probe_is_the_optimum_of_its_objective():
    features, target, *_, text = data()
    prior, strength = 10 * features @ text, 2.0
    coef, intercept = anchored_path(features, target, prior, [strength], tolerance=1e-13)

    def objective(flat):
        weights = flat.reshape(CLASSES, WIDTH + 1)
        logits = prior + features @ weights[:, :-1].T + weights[:, -1]
        loss = -log_softmax(logits, axis=1)[np.arange(len(target)), target].sum()
        residual = softmax(logits, axis=1) - np.eye(CLASSES)[target]
        slope = residual.T @ np.column_stack([features, np.ones(len(features))])
        return loss + (flat**2).sum() / 2 / strength, (slope + weights / strength).ravel()

    ours = np.column_stack([coef[0], intercept[0]]).ravel()
    best = minimize(objective, np.zeros_like(ours), jac=True, method="BFGS", options={"gtol": 1e-9})
    np.testing.assert_allclose(ours, best.x, atol=1e-4)


def test_prototypes_are_scikit_learns_nearest_centroid_on_the_sphere():
    train, target, test, test_target, _ = data()
    found = by(few_shot(train, target, test, test_target, shots=[20], seeds=2), "prototypes", 20)
    centre = unit(np.stack([train[target == k].mean(axis=0) for k in range(CLASSES)]))
    oracle = NearestCentroid().fit(centre, np.arange(CLASSES))
    assert found["per_seed"] == pytest.approx([oracle.score(test, test_target)] * 2)  # all 20 images are the shots


def test_a_probe_of_all_images_is_scikit_learns():
    train, target, test, test_target, _ = data()
    found = by(few_shot(train, target, test, test_target, shots=[20], seeds=2), "probe", 20)
    for value, strength in zip(found["per_seed"], found["strengths"], strict=True):
        oracle = LogisticRegression(C=strength, tol=1e-8, max_iter=20_000).fit(train, target)
        assert value == pytest.approx(oracle.score(test, test_target), abs=1.5 / len(test))


def test_the_cache_is_tip_adapters_formula():
    train, target, test, test_target, text = data()
    found = by(few_shot(train, target, test, test_target, text, shots=[1], seeds=2), "tip-adapter", 1)
    for seed in range(2):
        random = np.random.default_rng(seed)
        shots = [random.permutation(np.flatnonzero(target == k))[0] for k in range(CLASSES)]
        right = 0
        for row, label in zip(test, test_target, strict=True):
            logits = 100 * row @ text + [np.exp(-5.5 * (1 - row @ train[shot])) for shot in shots]
            right += logits.argmax() == label
        assert found["per_seed"][seed] == pytest.approx(right / len(test))


def test_zero_shot_looks_at_no_training_image():
    train, target, test, test_target, text = data()
    found = by(few_shot(train, target, test, test_target, text, shots=[1], seeds=2), "zero-shot", 0)
    assert found["top1"]["value"] == pytest.approx(((test @ text).argmax(axis=1) == test_target).mean())


def test_strengths_are_chosen_without_the_test_images():
    train, target, test, test_target, text = data(noise=2.0)
    first = few_shot(train, target, test, test_target, text, shots=[4], seeds=3)
    second = few_shot(train, target, -test[:7], test_target[::-1][:7], text, shots=[4], seeds=3)
    assert [entry["strengths"] for entry in first] == [entry["strengths"] for entry in second]


def test_seeds_in_one_batch_choose_what_each_alone_chooses():
    train, target, test, _, text = data(noise=2.0)
    order = fewshot._draw(target, CLASSES, 4, 3)
    chosen = order.transpose(0, 2, 1).reshape(3, -1)
    labels = np.tile(np.arange(CLASSES), 4)
    together, strengths = fewshot._regress(train[chosen], labels, test, None, None)
    for seed in range(3):
        alone, own = fewshot._regress(train[chosen][[seed]], labels, test, None, None)
        assert own == strengths[seed : seed + 1]
        np.testing.assert_allclose(softmax(alone[0], axis=1), softmax(together[seed], axis=1), atol=1e-3)


def test_shots_of_a_seed_are_nested_and_of_their_class():
    target = np.random.default_rng(0).integers(0, 3, size=60)
    few, more = fewshot._draw(target, 3, 2, 4), fewshot._draw(target, 3, 8, 4)
    np.testing.assert_array_equal(few, more[:, :, :2])
    assert all((target[more[:, k]] == k).all() for k in range(3))
    assert len({tuple(draw.ravel()) for draw in more}) == 4


def test_the_interval_is_students_over_seeds():
    from scipy.stats import t

    values = [0.5, 0.6, 0.7, 0.6]
    found = fewshot._over_seeds(values)
    low, high = t.interval(0.95, 3, loc=np.mean(values), scale=np.std(values, ddof=1) / 2)
    assert (found["low"], found["high"]) == pytest.approx((low, high))


def test_more_shots_help_and_the_text_helps_most_at_one():
    found = few_shot(*data(noise=1.5, train=40, test=200), shots=[1, 16], seeds=5)
    value = {(entry["method"], entry["shots"]): entry["top1"]["value"] for entry in found}
    assert value["probe", 16] > value["probe", 1] + 0.05
    assert value["anchored", 1] > value["probe", 1] + 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shots": [32]}, "class 0 has 20 training images, 32 shots"),
        ({"seeds": 1}, "at least 2 seeds"),
        ({"shots": []}, "shots"),
        ({"train_target_N": np.tile([0, 1, 2, 2], 20)}, "class 3 has 0 training images"),
        ({"train_target_N": np.zeros(80, int), "text_DK": None, "test_target_M": np.zeros(200, int)}, "two classes"),
        ({"text_DK": np.ones((WIDTH, 3))}, "there are 3 classes"),
        ({"text_DK": np.ones((WIDTH + 1, CLASSES))}, "widths"),
        ({"test_MD": np.full((200, WIDTH), np.nan)}, "row 0"),
    ],
)
def test_what_cannot_be_done_is_told(change, message):
    names = ("train_ND", "train_target_N", "test_MD", "test_target_M", "text_DK")
    arguments = dict(zip(names, data(), strict=True)) | {"shots": [1], "seeds": 2} | change
    with pytest.raises(UserError, match=message):
        few_shot(**arguments)

import itertools

import numpy as np
import pytest

from contrastive.errors import UserError
from contrastive.evaluation.compare import (
    check_same_samples,
    compare_samples,
    format_comparison,
    mcnemar,
    paired_difference,
)
from contrastive.evaluation.composition import pair_scores, swapped


@pytest.mark.parametrize(("only_a", "only_b"), [(1, 7), (4, 4), (0, 6), (5, 2)])
def test_mcnemar_equals_the_count_of_all_sign_flips(only_a, only_b):
    a = np.array([1] * only_a + [0] * only_b + [1, 1, 0])
    b = np.array([0] * only_a + [1] * only_b + [1, 1, 0])
    flips = [sum(flip) for flip in itertools.product((0, 1), repeat=only_a + only_b)]
    far = abs(only_a - (only_a + only_b) / 2)
    expected = np.mean([abs(heads - (only_a + only_b) / 2) >= far for heads in flips])
    found = mcnemar(a, b)
    assert (found["only_a"], found["only_b"]) == (only_a, only_b)
    assert found["p"] == pytest.approx(expected)


def test_mcnemar_of_equal_models_is_no_difference():
    assert mcnemar([True, False], [True, False])["p"] == 1.0


def test_a_paired_difference_agrees_with_redrawing_samples():
    random = np.random.default_rng(0)
    a = random.random(150)
    b = a + random.normal(0.05, 0.2, 150)
    drawn = [(b - a)[random.integers(0, 150, 150)].mean() for _ in range(5000)]
    found = paired_difference(a, b)
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert found["value"] == pytest.approx((b - a).mean())
    assert found["low"] == pytest.approx(low, abs=0.006) and found["high"] == pytest.approx(high, abs=0.006)
    assert found["p"] == pytest.approx(2 * np.mean(np.array(drawn) <= 0), abs=0.02)


def test_pairing_sees_what_two_intervals_do_not():
    random = np.random.default_rng(1)
    hard = random.random(400) < 0.5  # samples that both get wrong
    a, b = ~hard & (random.random(400) < 0.9), ~hard
    found = paired_difference(a, b)
    assert found["low"] > 0 and found["p"] < 0.01
    assert found["high"] - found["low"] < 0.08  # unpaired: two intervals of about 0.1 each


def test_equal_models_have_a_difference_of_zero():
    found = paired_difference(np.arange(10) % 2, np.arange(10) % 2)
    assert found == {"value": 0, "low": 0, "high": 0, "p": 1.0}


def test_measures_that_only_one_model_has_are_left_out():
    found = compare_samples(
        {"x/top1": np.array([True, False, True]), "x/mrr": np.array([1.0, 0.5, 0.2]), "y": np.array([1.0, 1, 1])},
        {"x/top1": np.array([True, True, True]), "x/mrr": np.array([1.0, 0.5, 0.5])},
    )
    assert set(found) == {"x/top1", "x/mrr"} and set(found["x/mrr"]) == {"a", "b", "difference"}
    assert found["x/top1"]["mcnemar"]["only_b"] == 1 and found["x/mrr"]["difference"]["value"] == pytest.approx(0.1)
    text = format_comparison(found, "old", "new")
    assert "a = old, b = new" in text and "+33.3" in text and "McNemar" in text and "bootstrap" in text


def test_different_images_are_told():
    with pytest.raises(UserError, match="2 are in one only, such as b"):
        check_same_samples(["a", "b"], ["a", "c"])
    with pytest.raises(UserError, match="order"):
        check_same_samples(["a", "b"], ["b", "a"])


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a dog on a mat.", "a mat on a dog."),
        ("a red square on top of a blue circle", "a blue circle on top of a red square"),
        ("cat and dog", "dog and cat"),
        ("an android", None),
        ("dog and Dog", None),
    ],
)
def test_a_swap_keeps_the_words(caption, expected):
    assert swapped(caption) == expected


def test_order_is_scored_beside_a_blind_baseline():
    random = np.random.default_rng(0)
    right, wrong = (random.normal(size=(200, 4)) for _ in range(2))
    image = np.where((np.arange(200) % 4 == 0)[:, None], wrong, right) * 3
    found = pair_scores(image, right, wrong, blind_D=image.mean(axis=0))
    distance = ((image - right) ** 2).sum(1) - (right**2).sum(1) < ((image - wrong) ** 2).sum(1) - (wrong**2).sum(1)
    assert found["model"]["value"] == distance.mean() and found["pairs"] == 200
    assert found["blind"]["value"] == pytest.approx(0.5, abs=0.1)
    prior = np.array([1.0, 0, 0, 0])  # right captions that all lie on one side need no image
    assert pair_scores(image, right + 5 * prior, wrong, blind_D=prior)["blind"]["value"] > 0.95


def test_a_model_that_is_blind_to_order_gets_nothing_and_not_a_half():
    found = pair_scores(np.ones((9, 2)), np.ones((9, 2)), np.ones((9, 2)), blind_D=np.ones(2))
    assert found["model"]["value"] == 0 and found["model"]["optimistic"] == 1


def test_a_log_likelihood_is_no_percentage():
    difference = {"value": 0.5, "low": 0.4, "high": 0.6, "p": 0.01}
    row = {"a": -2.5, "b": -2.0, "difference": difference}
    likelihood, share = format_comparison(
        {"zeroshot/log-likelihood": row, "zeroshot/top1": row}, "x", "y"
    ).splitlines()[2:]
    assert "-2.500" in likelihood and "+0.500" in likelihood and "-250.0" in share

"""Thresholds against scikit-learn and brute force."""

import numpy as np
import pytest
from sklearn.metrics import f1_score, roc_auc_score, roc_curve

from contrastive.errors import UserError
from contrastive.evaluation.rejection import (
    area_under_curve,
    false_positive_rate,
    keep_threshold,
    label_thresholds,
    separating_threshold,
)


@pytest.fixture(params=[2, 0], ids=["ties", "distinct"])
def scores(request):
    random = np.random.default_rng(0)
    known, unknown = random.normal(1, 1, 300), random.normal(0, 1, 200)
    return (known.round(1), unknown.round(1)) if request.param else (known, unknown)


def stacked(known, unknown):
    return np.r_[np.ones(len(known)), np.zeros(len(unknown))], np.r_[known, unknown]


def test_the_area_under_the_curve_is_scikit_learns(scores):
    assert area_under_curve(*scores) == pytest.approx(roc_auc_score(*stacked(*scores)), abs=1e-12)


@pytest.mark.parametrize("kept", [0.5, 0.95, 1.0])
def test_the_false_positive_rate_is_that_of_scikit_learns_curve(scores, kept):
    false, true, _ = roc_curve(*stacked(*scores), drop_intermediate=False)
    assert false_positive_rate(*scores, kept) == pytest.approx(false[true >= kept - 1e-12].min())


def test_the_threshold_keeps_the_share_and_a_higher_one_does_not(scores):
    known, _ = scores
    threshold = keep_threshold(known, 0.95)
    assert (known >= threshold).mean() >= 0.95
    assert (known > threshold).mean() < 0.95


def test_the_separating_threshold_has_the_best_balanced_accuracy(scores):
    known, unknown = scores

    def balanced(cut):
        return (known >= cut).mean() + (unknown < cut).mean()

    best = max(balanced(cut) for cut in np.r_[known, unknown, np.inf])
    assert balanced(separating_threshold(known, unknown)) == pytest.approx(best)


def test_each_label_has_the_threshold_of_its_best_f1():
    random = np.random.default_rng(1)
    truth = random.random((200, 3)) < [0.5, 0.2, 0.05]
    scores = (truth + random.normal(size=truth.shape)).round(1)
    for k, threshold in enumerate(label_thresholds(scores, truth)):
        best = max(f1_score(truth[:, k], scores[:, k] >= cut) for cut in np.unique(scores[:, k]))
        assert f1_score(truth[:, k], scores[:, k] >= threshold) == pytest.approx(best)


def test_a_label_that_no_image_has_takes_the_common_threshold():
    scores, truth = np.asarray([[3.0, 0.0], [1.0, 0.5]]), np.asarray([[1, 0], [0, 0]])
    assert label_thresholds(scores, truth).tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    ("scores", "truth", "message"),
    [([[1.0]], [[0]], "no image has any"), ([[1.0]], [[0, 1]], "differ"), ([[np.nan]], [[1]], "not finite")],
)
def test_thresholds_that_cannot_be_set_are_told(scores, truth, message):
    with pytest.raises(UserError, match=message):
        label_thresholds(scores, truth)


def test_no_images_are_told():
    with pytest.raises(UserError, match="unknown images: none"):
        area_under_curve([1.0], [])

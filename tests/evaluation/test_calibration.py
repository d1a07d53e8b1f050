"""Calibration against torch, torchmetrics and a plain search."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from contrastive.errors import UserError
from contrastive.evaluation import metrics
from contrastive.evaluation.calibration import expected_error, log_loss, reliability, temperature


def drawn(n=400, classes=5, sharpness=4.0, seed=0):
    """Logits that are `sharpness` times too sharp for the targets drawn from them."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(n, classes))
    target = np.asarray([random.choice(classes, p=p) for p in torch.as_tensor(logits).softmax(1).numpy()])
    return sharpness * logits, target


def test_the_log_loss_is_torchs():
    logits, target = drawn()
    expected = torch.nn.functional.cross_entropy(torch.as_tensor(logits), torch.as_tensor(target))
    assert log_loss(logits, target) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("sharpness", [0.1, 1, 30])
def test_the_temperature_has_the_least_log_loss(sharpness):
    logits, target = drawn(sharpness=sharpness)
    found = minimize_scalar(lambda t: log_loss(logits / np.exp(t), target), bounds=(-7, 7), method="bounded")
    assert temperature(logits, target) == pytest.approx(np.exp(found.x), rel=1e-3)


def test_a_split_that_is_all_right_gives_the_lower_bound_and_one_all_wrong_the_upper():
    logits = 5 * np.eye(3)
    assert temperature(logits, [0, 1, 2]) == pytest.approx(1e-3)
    assert temperature(logits, [1, 2, 0]) == pytest.approx(1e3)


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_the_expected_error_is_torchmetrics(bins):
    torchmetrics = pytest.importorskip("torchmetrics.functional.classification")
    logits, target = drawn()
    probabilities = torch.as_tensor(logits).softmax(1)
    expected = torchmetrics.multiclass_calibration_error(probabilities, torch.as_tensor(target), 5, n_bins=bins)
    assert expected_error(probabilities.numpy(), target, bins) == pytest.approx(float(expected), abs=1e-6)


def test_reliability_counts_every_sample_once_in_its_range():
    probabilities = np.asarray([[0.9, 0.1], [0.95, 0.05], [0.4, 0.6], [0.0, 1.0]])
    rows = reliability(probabilities, [0, 1, 1, 1], bins=5)
    assert [(row["samples"], row["accuracy"]) for row in rows] == [(1, 1.0), (3, pytest.approx(2 / 3))]
    assert [row["confidence"] for row in rows] == pytest.approx([0.6, 0.95])


@pytest.mark.parametrize(
    ("logits", "target", "message"),
    [([[1.0, np.nan]], [0], "row 0"), ([[1.0, 2.0]], [0, 1], "does not fit"), (np.zeros((0, 2)), [], "does not fit")],
)
def test_logits_that_cannot_be_meant_are_told(logits, target, message):
    with pytest.raises(UserError, match=message):
        temperature(logits, target)


def test_the_interval_of_the_error_holds_it_where_the_model_is_calibrated():
    random = np.random.default_rng(0)
    probabilities = random.dirichlet(np.ones(4), 2000)
    target = np.asarray([random.choice(4, p=row) for row in probabilities])
    found = metrics.expected_error(probabilities, target)
    assert 0 <= found["low"] < found["value"] < found["high"] < 0.05

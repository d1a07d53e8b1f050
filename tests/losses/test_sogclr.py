import math

import pytest
import torch
from torch import Tensor

from contrastive.losses import SogCLR, dcl, sogclr
from tests.losses.dense import dcl_matrix, features, gradients, scalar, worst_error

SCALE = 12.5
ENGINES = [{}, {"tile": 3}, {"tile": None}]


def unseen(rows: int) -> Tensor:
    return torch.full((rows, 2), -torch.inf, dtype=torch.float64)


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_gradient_with_gamma_1_is_that_of_dcl_times_the_temperature(engine: dict) -> None:
    image, text = features(0, 11, 6)
    # averages of before are nothing to it; epsilon is small against every u here
    loss = sogclr(image, text, scalar(SCALE), log_u=torch.ones(11, 2), gamma=1.0, epsilon=1e-30, **engine)["loss"]
    oracle = dcl_matrix(image, text, scalar(SCALE), None, torch.arange(11)) / SCALE
    assert worst_error(gradients(loss, image, text), gradients(oracle, image, text)) < 1e-12


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_gradient_at_a_first_visit_is_that_of_dcl_times_the_temperature(engine: dict) -> None:
    image, text = features(1, 7, 6)
    loss = sogclr(image, text, scalar(SCALE), log_u=unseen(7), gamma=0.3, epsilon=1e-30, **engine)["loss"]
    oracle = dcl(image, text, scalar(SCALE), tile=None)["loss"] / SCALE
    assert worst_error(gradients(loss, image, text), gradients(oracle, image, text)) < 1e-12


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_averages_move_by_gamma_towards_the_mean_over_negatives(engine: dict) -> None:
    image, text = features(2, 6, 5)
    log_u = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    log_u[4] = -torch.inf
    new = sogclr(image, text, scalar(SCALE), log_u=log_u, gamma=0.25, **engine)["log_u"]
    for i in range(6):
        others = [j for j in range(6) if j != i]
        for direction, (a, b) in enumerate(((image, text), (text, image))):
            own = float(image[i].detach().dot(text[i].detach()))
            g = sum(math.exp(SCALE * (float(a[i].detach().dot(b[j].detach())) - own)) for j in others) / 5
            u = g if i == 4 else 0.75 * math.exp(log_u[i, direction]) + 0.25 * g
            assert new[i, direction].item() == pytest.approx(math.log(u), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_without_rho_the_scales_gradient_is_exactly_zero(engine: dict) -> None:
    image, text = features(3, 6, 5)
    scale, bias = scalar(SCALE), scalar(-1.0)
    loss = sogclr(image, text, scale, bias, log_u=unseen(6), **engine)["loss"]
    assert torch.autograd.grad(loss, (scale, bias)) == (0, 0)  # and both are in the graph


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_rho_learns_the_temperature_along_the_objectives_slope(engine: dict) -> None:
    # with gamma 1, u is g, and the gradient is that of the objective tau (log(epsilon + g) + rho): by differences
    image, text = features(4, 8, 5)
    options = {"log_u": unseen(8), "gamma": 1.0, "rho": 8.5} | engine
    scale = scalar(SCALE)
    (found,) = gradients(sogclr(image, text, scale, **options)["loss"], scale)
    step = 1e-4
    ends = [sogclr(image, text, scalar(SCALE + way * step), **options)["loss"].item() for way in (1, -1)]
    assert found.item() == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-6)


def test_larger_rho_pushes_the_temperature_down_harder() -> None:
    image, text = features(4, 8, 5)
    slopes = []
    for rho in (6.5, 11.0):
        scale = scalar(SCALE)
        slopes += gradients(sogclr(image, text, scale, log_u=unseen(8), rho=rho)["loss"], scale)
    # d (tau rho) / d scale = -rho / scale^2
    assert (slopes[1] - slopes[0]).item() == pytest.approx(-4.5 / SCALE**2, rel=1e-9)


# ---- the module, which keeps the averages


def test_averages_belong_to_sample_numbers_and_not_to_places_in_the_batch() -> None:
    image, text = features(5, 6, 5)
    samples, order = torch.tensor([8, 2, 5, 0, 9, 3]), torch.tensor([3, 1, 5, 0, 2, 4])
    one, other = SogCLR(samples=10, gamma=0.5), SogCLR(samples=10, gamma=0.5)
    for _ in range(2):
        one(image, text, scalar(SCALE), samples=samples)
        other(image[order], text[order], scalar(SCALE), samples=samples[order])
    torch.testing.assert_close(one.log_u, other.log_u)
    assert one.log_u.isfinite().all(dim=1).nonzero()[:, 0].tolist() == sorted(samples.tolist())


def test_second_visit_starts_from_the_average_of_the_first() -> None:
    image, text = features(6, 5, 4)
    loss = SogCLR(samples=5, gamma=0.5)
    samples = torch.arange(5)
    loss(image, text, scalar(SCALE), samples=samples)
    kept = loss.log_u.clone()
    second = loss(text, image.flip(0), scalar(SCALE), samples=samples)
    expected = sogclr(text, image.flip(0), scalar(SCALE), log_u=kept, gamma=0.5)
    assert second["loss"] == expected["loss"]
    assert torch.equal(loss.log_u, expected["log_u"])


def test_averages_survive_a_state_dict() -> None:
    image, text = features(7, 5, 4)
    first, second = SogCLR(samples=9, gamma=0.5), SogCLR(samples=9, gamma=0.5)
    samples = torch.tensor([1, 8, 3, 0, 5])
    first(image, text, scalar(SCALE), samples=samples)
    second.load_state_dict(first.state_dict())
    arguments = (text.flip(0), image, scalar(SCALE))
    assert second(*arguments, samples=samples)["loss"] == first(*arguments, samples=samples)["loss"]
    assert torch.equal(first.log_u, second.log_u)


def test_of_a_sample_twice_in_a_batch_the_later_row_stays() -> None:
    image, text = features(8, 5, 4)
    loss, samples = SogCLR(samples=6, gamma=0.5), torch.tensor([4, 1, 4, 2, 1])
    loss(image, text, scalar(SCALE), samples=samples)
    new = sogclr(image, text, scalar(SCALE), log_u=unseen(5), gamma=0.5)["log_u"].float()
    for sample, row in ((4, 2), (1, 4), (2, 3)):
        assert torch.equal(loss.log_u[sample], new[row])


def test_row_that_is_not_valid_writes_nothing() -> None:
    image, text = features(9, 5, 4)
    loss, valid = SogCLR(samples=5), torch.tensor([True, True, False, True, True])
    loss(image, text, scalar(SCALE), samples=torch.arange(5), valid=valid)
    assert torch.equal(loss.log_u.isfinite().all(dim=1), valid)


def test_padding_that_repeats_a_sample_does_not_undo_its_average() -> None:
    image, text = features(9, 5, 4)
    loss, valid = SogCLR(samples=5), torch.tensor([True, True, True, True, False])
    loss(image, text, scalar(SCALE), samples=torch.tensor([0, 1, 2, 3, 0]), valid=valid)
    assert loss.log_u[0].isfinite().all()


def test_evaluation_writes_nothing() -> None:
    image, text = features(9, 5, 4)
    loss = SogCLR(samples=5).eval()
    loss(image, text, scalar(SCALE), samples=torch.arange(5))
    assert loss.log_u.isneginf().all()


def test_module_logs_no_averages() -> None:
    image, text = features(9, 5, 4)
    found = SogCLR(samples=5)(image, text, scalar(SCALE), samples=torch.arange(5))
    assert set(found) == {"loss", "accuracy"}

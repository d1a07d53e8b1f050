"""The range test on problems whose largest stable rate is known."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contrastive.training.range_test import RangeTest, exponential_rates, range_test

STEPS = 200


def on_a_quadratic(curvature: float, noise: float = 0.0, low: float = 1e-4, high: float = 1e2) -> RangeTest:
    """Plain gradient descent on ½ L w², which is stable below a rate of 2 / L."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=1.0)

    def step(rate: float) -> float:
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss = 0.5 * curvature * (weight - noise * torch.randn((), generator=generator, dtype=torch.float64)) ** 2
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return range_test(step, exponential_rates(low, high, STEPS))


@settings(max_examples=20, deadline=None)
@given(st.floats(0.3, 300))
def test_divergence_begins_at_two_over_the_curvature(curvature: float) -> None:
    found = on_a_quadratic(curvature)
    factor = found.rates[1] / found.rates[0]
    assert found.diverged is not None
    assert 2 / curvature / factor**3 < found.diverged < 2 / curvature * factor**3  # three of 200 steps


@pytest.mark.parametrize("curvature", [0.5, 7.0, 100.0])
def test_noise_moves_it_by_less_than_a_factor_of_two(curvature: float) -> None:
    found = on_a_quadratic(curvature, noise=0.1)
    assert found.diverged is not None and 0.5 < found.diverged / (2 / curvature) < 2


def test_the_test_ends_soon_behind_the_divergence_and_the_steepest_descent_is_before_it() -> None:
    found = on_a_quadratic(7.0)
    assert len(found.rates) < STEPS and found.steepest is not None and found.diverged is not None
    assert found.steepest < found.diverged


def test_rates_that_are_all_stable_do_not_diverge() -> None:
    found = on_a_quadratic(1.0, high=1.0)
    assert found.diverged is None and len(found.rates) == STEPS


def test_a_loss_that_returns_to_chance_has_diverged() -> None:
    """What a contrastive loss does: 6 at first, down to 4, and back to 6 from a rate of 0.1 on."""
    rates = exponential_rates(1e-5, 10, 100)
    noise = torch.randn(100, generator=torch.Generator().manual_seed(0)).tolist()

    def loss(rate: float) -> float:
        down = 2 / (1 + math.exp(-3 * math.log(rate / 1e-3)))
        back = 2 / (1 + math.exp(-8 * math.log(rate / 0.3)))
        return 6 - down + back + 0.03 * noise.pop()

    found = range_test(loss, rates)
    assert found.diverged is not None and 0.05 < found.diverged < 0.3
    assert found.steepest is not None and 2e-4 < found.steepest < 5e-3


def test_noise_alone_is_no_divergence_and_no_descent_to_speak_of() -> None:
    for seed in range(20):
        noise = torch.randn(100, generator=torch.Generator().manual_seed(seed)).tolist()
        found = range_test(lambda rate: 6 + 0.05 * noise.pop(), exponential_rates(1e-5, 10, 100))  # noqa: B023
        assert found.diverged is None


def test_a_loss_that_is_no_number_ends_it_there() -> None:
    losses = iter([5.0, 4.0, 3.0, 2.0, float("nan"), 1.0])
    found = range_test(lambda rate: next(losses), [1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    assert len(found.losses) == 5 and found.losses[-1] == math.inf
    assert found.diverged is not None and 4.0 <= found.diverged <= 16.0


def test_rates_grow_by_the_same_factor() -> None:
    assert exponential_rates(1e-4, 1e2, 7) == pytest.approx([1e-4, 1e-3, 1e-2, 0.1, 1, 10, 100])

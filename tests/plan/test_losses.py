"""What a loss sends, computes and holds, against what it really does."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from contrastive.losses import exchange, infonce, margin, siglip, tiled
from contrastive.plan import losses
from contrastive.plan.losses import LossTerm
from tests.distributed.spawn import run_ranks
from tests.losses.dense import features
from tests.losses.test_traffic import DIM, FEATURES, ROWS, WORLD, traffic

# the cases of tests/losses/test_traffic.py, as a recipe names them
TERMS = {
    "plain": LossTerm("infonce", tile=None),
    "gather": LossTerm("infonce", exchange="gather"),
    "gather, one sweep": LossTerm("siglip", exchange="gather", sweeps=1),
    "ring, two sweeps": LossTerm("infonce", exchange="ring"),
    "ring, two sweeps, hinge": LossTerm("margin", exchange="ring"),
    "ring, one sweep": LossTerm("siglip", exchange="ring", sweeps=1),
    "ring, one sweep, hinge": LossTerm("margin", exchange="ring", sweeps=1),
    "cyclip": LossTerm("cyclip", tile=None),
}


@pytest.fixture(scope="module")
def counted() -> dict[str, float]:
    return run_ranks(WORLD, traffic)[0]


@pytest.mark.parametrize("name", TERMS)
def test_traffic_is_what_is_counted_at_torch_distributed(counted: dict[str, float], name: str) -> None:
    of_the_order_of_the_batch = (losses.IDS + losses.STATISTICS) * (WORLD - 1) * ROWS
    assert of_the_order_of_the_batch < FEATURES / 2  # the terms of the table are whole multiples of FEATURES
    assert losses.traffic(TERMS[name], ROWS, WORLD, DIM) == pytest.approx(counted[name], abs=of_the_order_of_the_batch)


def test_a_teachers_features_travel_as_the_page_of_losses_says() -> None:
    n, w, d, t = 32, 4, 64, 48
    small = 32 * (w - 1) * n
    gathered = losses.traffic(LossTerm("distillation", exchange="gather", fixed=t), n, w, d)
    assert gathered == 4 * (w - 1) * n * (2 * d + t) + small
    ring = losses.traffic(LossTerm("distillation", exchange="ring", fixed=t), n, w, d)
    assert ring == 4 * (3 * w - 2) * n * d + 8 * (w - 1) * n * t + small


def test_the_automatic_exchange_turns_to_the_ring_where_the_losses_do() -> None:
    assert losses.GATHER_AT_MOST == exchange.GATHER_AT_MOST
    term, d, world = LossTerm("infonce"), 512, 64
    limit = losses.GATHER_AT_MOST // (4 * world * d)
    assert [losses.rings(term, n, world, d) for n in (limit, limit + 1)] == [False, True]


def test_the_sizes_of_tiles_are_those_of_the_losses() -> None:
    ours = (losses.AUTO_TILE, losses.KEEP_ALL_AT_MOST, losses.KEEP_SOME)
    assert ours == (tiled.AUTO_TILE_ELSEWHERE, tiled.KEEP_ALL_AT_MOST, tiled.KEEP_SOME)


@pytest.mark.parametrize(
    ("function", "term"),
    [
        (infonce, LossTerm("infonce")),
        (infonce, LossTerm("infonce", tile=16)),
        (infonce, LossTerm("infonce", tile=None)),
        (siglip, LossTerm("siglip", sweeps=1)),
        (siglip, LossTerm("siglip", tile=16, sweeps=1)),
        (siglip, LossTerm("siglip", tile=None, sweeps=1)),
        (margin, LossTerm("margin", sweeps=1)),
    ],
)
def test_flops_are_those_that_torch_counts(function, term: LossTerm) -> None:
    image, text = (x.detach().requires_grad_() for x in features(0, 64, 32, torch.float32))
    in_place = {torch.ops.aten.addmm_: lambda out, a, b, **_: 2 * a[0] * a[1] * b[1]}  # torch's counter leaves it out
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        function(image, text, torch.tensor(10.0), torch.tensor(-10.0), tile=term.tile)["loss"].backward()
    assert losses.flops(term, 64, 1, 32) == counter.get_total_flops()


def test_tiles_hold_less_than_matrices_from_thousands_of_rows_on() -> None:
    for world, exchanged in itertools.product((1, 8), ("gather", "ring")):
        tiles = losses.memory(LossTerm("infonce", exchange=exchanged), 8192, world, 512)
        assert tiles < losses.memory(LossTerm("infonce", tile=None), 8192, world, 512) / 2


def test_sogclr_keeps_eight_bytes_a_sample() -> None:
    term = LossTerm("sogclr")
    assert losses.memory(term, 64, 1, 32, 10**6) - losses.memory(term, 64, 1, 32, 0) == 8e6

"""The bytes between processes that docs/losses.md names, counted at torch.distributed."""

import pytest
import torch
import torch.distributed as dist

from contrastive.losses import cyclip, gather, infonce, margin, siglip
from tests.distributed.spawn import run_ranks
from tests.losses.dense import features

WORLD, ROWS, DIM = 4, 32, 64  # ROWS of one rank: features outweigh what is of the order of B
FEATURES = 4 * ROWS * DIM  # bytes of one tower's
CASES = {
    "plain": (infonce, {"tile": None}),
    "gather": (infonce, {"exchange": "gather"}),
    "gather, one sweep": (siglip, {"exchange": "gather"}),
    "ring, two sweeps": (infonce, {"exchange": "ring"}),
    "ring, two sweeps, hinge": (margin, {"exchange": "ring", "negatives": "semi-hard"}),
    "ring, one sweep": (siglip, {"exchange": "ring"}),
    "ring, one sweep, hinge": (margin, {"exchange": "ring"}),
    "cyclip": (cyclip, {}),
}


def traffic(rank: int, world: int) -> dict[str, float]:
    """Bytes that this rank receives, as NCCL's collectives move them."""
    received = 0.0

    def count(tensor: torch.Tensor, share: float) -> None:
        nonlocal received
        received += tensor.numel() * tensor.element_size() * share

    def counted(function, share):
        def call(tensor, *arguments, **keywords):
            count(tensor, share)
            return function(tensor, *arguments, **keywords)

        return call

    all_reduce, reduce_scatter, batch = dist.all_reduce, gather.reduce_scatter, dist.batch_isend_irecv

    def scattered(tensor, group):
        nonlocal received
        before = received
        result = reduce_scatter(tensor, group)
        received = before  # gloo's way is an all-reduce; NCCL's is a reduce-scatter
        count(tensor, (world - 1) / world)
        return result

    def passed_on(operations):
        for operation in operations:
            if operation.op is dist.irecv:
                count(operation.tensor, 1.0)
        return batch(operations)

    gather._all_gather = counted(gather._all_gather, (world - 1) / world)
    dist.all_reduce = counted(all_reduce, 2 * (world - 1) / world)
    dist.batch_isend_irecv = passed_on
    from contrastive.losses import exchange

    gather.reduce_scatter = exchange.reduce_scatter = scattered
    found = {}
    for name, (loss, options) in CASES.items():
        image, text = (x.detach().requires_grad_() for x in features(rank, ROWS, DIM, torch.float32))
        received = 0.0
        loss(image, text, torch.tensor(10.0), torch.tensor(-10.0), **options)["loss"].backward()
        found[name] = received
    return found


@pytest.fixture(scope="module")
def counted() -> dict[str, float]:
    return run_ranks(WORLD, traffic)[0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("plain", 4 * (WORLD - 1) * FEATURES),
        ("gather", 2 * (WORLD - 1) * FEATURES),
        ("gather, one sweep", 2 * (WORLD - 1) * FEATURES),
        ("ring, two sweeps", (3 * WORLD - 2) * FEATURES),
        ("ring, two sweeps, hinge", (3 * WORLD - 2) * FEATURES),
        ("ring, one sweep", (2 * WORLD - 1) * FEATURES),
        ("ring, one sweep, hinge", (2 * WORLD - 1) * FEATURES),
    ],
)
def test_a_step_receives_the_features_that_the_page_names_and_numbers_of_the_order_of_the_batch(
    counted: dict[str, float], name: str, expected: int
) -> None:
    of_the_order_of_the_batch = 32 * WORLD * ROWS
    assert expected <= counted[name] <= expected + of_the_order_of_the_batch


def test_cyclip_receives_nothing_that_grows_with_the_batch(counted: dict[str, float]) -> None:
    notes = 48 * WORLD  # six numbers a rank: do the ranks' arguments fit together?
    assert counted["cyclip"] == pytest.approx(96 * DIM**2 * (WORLD - 1) / WORLD, abs=notes)

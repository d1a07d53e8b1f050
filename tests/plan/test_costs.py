"""Memory, seconds and traffic of a step, against sums by hand."""

import dataclasses

import pytest

from contrastive.plan import costs
from contrastive.plan.cards import GIB, Card
from contrastive.plan.costs import Assumptions, Job, Linear, Network, Tower
from contrastive.plan.losses import LossTerm

ZERO = Linear(0.0)
IDEAL = Assumptions(
    utilisation=1, memory_utilisation=1, link_utilisation=1, overlap=0, per_node=8, link=100, network=10, reserve=0
)
CARD = Card("test", {"bf16": 100.0, "fp32": 10.0}, memory=1, bandwidth=1000, link=100)


def tower(**changes: object) -> Tower:
    plain = Tower("image", 1000, 1000, Linear(1e9), Linear(2e9), ZERO, ZERO, Linear(1000.0), Linear(1000.0))
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


def job(rows: int = 8, world: int = 1, chunk: int | None = None, **changes: object) -> Job:
    network = Network((tower(**changes),), further=0, buffers=0, dim=4, input_bytes=0)
    return Job(network, (LossTerm("infonce"),), rows, world, chunk)


def test_the_line_through_two_batches_gives_both() -> None:
    line = costs.through(2, 110.0, 4, 210.0)
    assert (line.at(2), line.at(4), line.at(100)) == (110.0, 210.0, 5010.0)


@pytest.mark.parametrize("world", [1, 2, 5, 64])
def test_a_ring_all_reduce_sends_what_its_steps_send(world: int) -> None:
    pieces, sent = 1000.0 / world, 0.0
    for _ in range(world - 1):  # reduce-scatter: a piece to the neighbour each time
        sent += pieces
    for _ in range(world - 1):  # all-gather: likewise
        sent += pieces
    assert costs.ring_all_reduce(1000.0, world) == pytest.approx(sent)


@pytest.mark.parametrize(
    ("n", "chunk", "rows", "forward_rows", "calls"),
    [(8, None, 8, 8, 1), (8, 8, 8, 8, 1), (8, 16, 8, 8, 1), (8, 2, 2, 14, 7), (10, 4, 4, 18, 5)],
)
def test_a_chunk_is_one_more_forward_of_all_chunks_but_the_last(
    n: int, chunk: int | None, rows: int, forward_rows: int, calls: int
) -> None:
    found = costs.passes(n, chunk)
    assert (found.rows, found.forward_rows, found.calls) == (rows, forward_rows, calls)


def test_adamw_holds_eight_bytes_a_learned_parameter_and_gradients_four() -> None:
    parts = costs.memory_parts(job(parameters=1000, learned=300), 0)
    assert (parts["weights"], parts["gradients"], parts["optimizer moments"]) == (4000, 1200, 2400)


def test_activations_are_those_of_a_chunk() -> None:
    whole, chunked = (costs.memory_parts(job(8, chunk=c), 0)["activations"] for c in (None, 2))
    assert (whole, chunked) == (8000, 2000)


def test_products_take_their_flops_over_the_cards_peak() -> None:
    seconds = costs.step(job(8), CARD, "bf16", IDEAL).seconds
    assert seconds["towers, products"] == pytest.approx(8 * 3e9 / 100e12)


def test_a_chunked_step_computes_the_forwards_again() -> None:
    found = costs.step(job(8, chunk=2), CARD, "bf16", IDEAL)
    assert found.tower_flops == pytest.approx(14 * 1e9 + 8 * 2e9)


def test_what_a_call_costs_whatever_its_rows_is_paid_at_every_call() -> None:
    found = costs.step(job(8, chunk=2, forward_bytes=Linear(0, 100), backward_bytes=Linear(0, 10)), CARD, "bf16", IDEAL)
    assert found.tower_bytes == 7 * 100 + 4 * 10


def test_half_the_utilisation_takes_twice_the_time() -> None:
    half = dataclasses.replace(IDEAL, utilisation=0.5, memory_utilisation=0.5)
    once, twice = (costs.step(job(8), CARD, "bf16", assumed).total for assumed in (IDEAL, half))
    assert twice == pytest.approx(2 * once)


@pytest.mark.parametrize(("world", "gigabytes"), [(8, 100), (16, 80)])
def test_gradients_go_over_the_link_in_a_machine_and_over_all_its_adapters_between_machines(
    world: int, gigabytes: float
) -> None:
    found = costs.step(job(8, world), CARD, "bf16", IDEAL)
    assert found.seconds["gradients, all-reduce"] == pytest.approx(2 * (world - 1) / world * 4000 / (gigabytes * 1e9))


def test_an_all_reduce_that_fits_behind_the_backward_costs_nothing() -> None:
    hidden = costs.step(job(8, 8), CARD, "bf16", dataclasses.replace(IDEAL, overlap=1.0))
    assert hidden.seconds["gradients, all-reduce"] == 0


def test_the_bound_is_the_longest_part() -> None:
    slow = dataclasses.replace(IDEAL, link=1e-6)
    assert costs.step(job(8), CARD, "bf16", IDEAL).bound == "towers, products"
    assert costs.step(job(8, 2), CARD, "bf16", slow).bound == "gradients, all-reduce"


def test_one_process_sends_nothing() -> None:
    found = costs.step(job(8, 1), CARD, "bf16", IDEAL)
    assert (found.gradient_traffic, found.loss_traffic) == (0, 0)


def test_the_largest_chunk_that_fits_fits_and_the_next_does_not() -> None:
    large = job(64, saved=Linear(GIB / 10), peak=Linear(GIB / 10))
    chunk = costs.largest_chunk(large, 0, GIB)
    assert chunk == 8
    sizes = [sum(costs.memory_parts(dataclasses.replace(large, chunk=c), 0).values()) for c in (chunk, 2 * chunk)]
    assert sizes[0] <= GIB < sizes[1]


def test_there_is_no_chunk_where_the_weights_alone_are_too_many() -> None:
    assert costs.largest_chunk(job(64, parameters=GIB, learned=GIB), 0, GIB) is None


def test_more_devices_hold_fewer_rows_each() -> None:
    large = job(64, saved=Linear(GIB / 10), peak=Linear(GIB / 10))
    assert costs.fewest_devices(large, 0, GIB) == 8

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contrastive.errors import UserError
from contrastive.shards.order import Order, draws, hash64, local_batch

sizes = st.integers(1, 60)
seeds = st.integers(0, 2**63 - 1)


def test_hash_of_one_word_is_the_published_splitmix64() -> None:
    # First outputs of Vigna's splitmix64.c for the states 0 and 1234567.
    assert hash64(0).tolist() == [0xE220A8397B1DCDAF]
    assert hash64(1234567).tolist() == [6457827717110365317]


@settings(max_examples=50, deadline=None)
@given(size=sizes, seed=seeds, epochs=st.integers(1, 4))
def test_every_epoch_holds_every_sample_once(size: int, seed: int, epochs: int) -> None:
    epoch, samples = Order(size, seed).at(0, size * epochs)
    for number in range(epochs):
        assert sorted(samples[epoch == number].tolist()) == list(range(size))


@settings(max_examples=50, deadline=None)
@given(size=sizes, seed=seeds, world=st.integers(1, 5), local=st.integers(1, 30), step=st.integers(0, 20))
def test_ranks_partition_the_global_batch_in_order(size: int, seed: int, world: int, local: int, step: int) -> None:
    order, batch = Order(size, seed), world * local
    whole = order.step(step, batch)
    parts = [order.step(step, batch, rank, world) for rank in range(world)]
    for column in range(2):
        assert np.concatenate([part[column] for part in parts]).tolist() == whole[column].tolist()


@settings(max_examples=50, deadline=None)
@given(size=sizes, seed=seeds, batch=st.integers(1, 90))
def test_steps_are_consecutive_pieces_of_one_stream(size: int, seed: int, batch: int) -> None:
    order = Order(size, seed)
    steps = np.concatenate([order.step(step, batch)[1] for step in range(4)])
    assert steps.tolist() == order.at(0, 4 * batch)[1].tolist()


def test_epochs_and_seeds_have_different_orders() -> None:
    orders = {tuple(Order(50, seed).at(50 * epoch, 50 * epoch + 50)[1].tolist()) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4


def test_order_is_the_same_on_every_machine() -> None:
    assert Order(8, seed=3).at(0, 16)[1].tolist() == [4, 7, 2, 6, 5, 3, 0, 1, 3, 1, 5, 2, 4, 7, 6, 0]


def test_places_in_the_order_are_uniform() -> None:
    first = np.bincount([int(Order(8, seed).at(0, 1)[1][0]) for seed in range(4000)], minlength=8)
    assert (abs(first - 500) < 5 * np.sqrt(500 * 7 / 8)).all()


def test_draws_depend_on_the_sample_and_not_on_its_company() -> None:
    epochs, samples = np.zeros(10, np.int64), np.arange(10)
    together = draws(7, epochs, samples, 5)
    alone = draws(7, epochs[3:4], samples[3:4], 9)
    assert together[3].tolist() == alone[0, :5].tolist()
    assert len(np.unique(together)) == 50


def test_draws_are_uniform() -> None:
    numbers = draws(0, np.zeros(20000, np.int64), np.arange(20000), 3)
    counts = np.histogram(numbers, bins=10, range=(0, 1))[0]
    assert (abs(counts - 6000) < 5 * np.sqrt(6000)).all()
    assert abs(np.corrcoef(numbers.T) - np.eye(3)).max() < 5 / np.sqrt(20000)


def test_a_batch_that_does_not_divide_names_the_nearest_that_do() -> None:
    with pytest.raises(UserError, match="100 is not divisible by 3 processes; use 99 or 102"):
        local_batch(100, 3)

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contrastive.errors import UserError
from contrastive.shards.order import Order, draws, hash64, local_batch

seeds = st.integers(0, 2**63 - 1)
layouts = st.lists(st.integers(0, 12), min_size=1, max_size=12).filter(any)  # samples in each shard
windows = st.none() | st.integers(1, 14)


def order_of(shards: list[int], seed: int, window: int | None = None) -> Order:
    return Order(np.cumsum([0, *shards]), seed, window)


def test_hash_of_one_word_is_the_published_splitmix64() -> None:
    # First outputs of Vigna's splitmix64.c for the states 0 and 1234567.
    assert hash64(0).tolist() == [0xE220A8397B1DCDAF]
    assert hash64(1234567).tolist() == [6457827717110365317]


@settings(max_examples=50, deadline=None)
@given(shards=layouts, window=windows, seed=seeds, epochs=st.integers(1, 4))
def test_every_epoch_holds_every_sample_once(shards: list[int], window: int | None, seed: int, epochs: int) -> None:
    size = sum(shards)
    epoch, samples = order_of(shards, seed, window).at(0, size * epochs)
    for number in range(epochs):
        assert sorted(samples[epoch == number].tolist()) == list(range(size))


@settings(max_examples=50, deadline=None)
@given(shards=layouts, window=windows, seed=seeds, start=st.integers(0, 500), length=st.integers(0, 90))
def test_any_start_gives_the_same_stream(
    shards: list[int], window: int | None, seed: int, start: int, length: int
) -> None:
    whole = order_of(shards, seed, window).at(0, start + length)
    part = order_of(shards, seed, window).at(start, start + length)
    assert [column.tolist() for column in part] == [column[start:].tolist() for column in whole]


@settings(max_examples=50, deadline=None)
@given(shards=layouts, window=st.integers(1, 14), seed=seeds)
def test_a_window_is_emptied_before_the_next_one_begins(shards: list[int], window: int, seed: int) -> None:
    starts = np.cumsum([0, *shards])
    samples = order_of(shards, seed, window).at(0, sum(shards))[1]
    met = list(dict.fromkeys((np.searchsorted(starts, samples, side="right") - 1).tolist()))
    last_of = {
        shard: int(np.flatnonzero((samples >= starts[shard]) & (samples < starts[shard + 1])).max()) for shard in met
    }
    first_of = {
        shard: int(np.flatnonzero((samples >= starts[shard]) & (samples < starts[shard + 1])).min()) for shard in met
    }
    # when a shard begins, at most `window` shards (itself among them) are begun and not over
    for shard in met:
        unfinished = [s for s in met if first_of[s] <= first_of[shard] <= last_of[s]]
        assert len(unfinished) <= window


def test_shards_change_their_company_from_epoch_to_epoch() -> None:
    order = order_of([10] * 40, seed=0, window=2)
    pairs = [
        {frozenset(pair) for pair in (order.at(400 * epoch, 400 * epoch + 400)[1] // 10).reshape(20, 20).tolist()}
        for epoch in range(2)
    ]
    assert all(len(pair) == 2 for pair in pairs[0] | pairs[1])
    assert len(pairs[0] & pairs[1]) <= 3  # half a pair is expected


def test_a_step_of_a_billion_samples_costs_one_window() -> None:
    import time
    import tracemalloc

    starts = np.arange(0, 1_000_000_001, 10_000)
    tracemalloc.start()
    begun = time.perf_counter()
    order = Order(starts, seed=1, window=4)
    samples = order.at(123_456_789_000, 123_456_789_512)[1]
    seconds, peak = time.perf_counter() - begun, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(samples.tolist())) == 512
    assert len(set((samples // 10_000).tolist())) <= 4
    assert peak < 32e6 and seconds < 5, (peak, seconds)  # the whole permutation would take 8 GB


def test_epochs_and_seeds_have_different_orders() -> None:
    orders = {
        tuple(order_of([50], seed).at(50 * epoch, 50 * epoch + 50)[1].tolist()) for seed in (0, 1) for epoch in (0, 1)
    }
    assert len(orders) == 4


def test_order_is_the_same_on_every_machine() -> None:
    assert order_of([3, 5], seed=3).at(0, 16)[1].tolist() == [4, 7, 2, 6, 5, 3, 0, 1, 3, 1, 5, 2, 4, 7, 6, 0]


def plain_hash(*words: int) -> int:
    """splitmix64 of each word in turn, in Python's whole numbers."""
    state = 0
    for word in words:
        state = ((state ^ word) + 0x9E3779B97F4A7C15) % 2**64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
        state = state ^ (state >> 31)
    return state


def test_order_is_the_one_of_a_plain_program() -> None:
    shards, seed, window = [[0, 1], [2, 3, 4], [5], [6, 7]], 3, 2
    expected = []
    for epoch in range(3):
        order = sorted(range(4), key=lambda s: plain_hash(int.from_bytes(b"shards", "big"), seed, epoch, s))
        for first in range(0, 4, window):
            members = [sample for shard in order[first : first + window] for sample in shards[shard]]
            expected += sorted(members, key=lambda i: plain_hash(int.from_bytes(b"order", "big"), seed, epoch, i))
    assert order_of([2, 3, 1, 2], seed, window).at(0, 24)[1].tolist() == expected


def test_places_in_the_order_are_uniform() -> None:
    first = np.bincount([int(order_of([8], seed).at(0, 1)[1][0]) for seed in range(4000)], minlength=8)
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

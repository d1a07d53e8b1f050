import itertools
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contrastive.errors import UserError
from contrastive.pretrain import pretrain
from contrastive.shards import Mixture, PairLoader, ShardIndex, open_source, write_shards
from contrastive.shards.mixture import MixedOrder
from tests.distributed.spawn import run_ranks
from tests.tiny import tiny_config, write_corpus

from .conftest import lengths, records

Shards = Callable[..., ShardIndex]


class FakeIndex:
    """What an order needs of an index."""

    def __init__(self, shards: list[int], fingerprint: str = "f") -> None:
        self.shard_starts = np.cumsum([0, *shards])
        self.ids = self.image_ids = np.arange(self.shard_starts[-1])
        self.repeated_images = 0
        self.rejected: dict[str, int] = {}
        self.fingerprint, self.folder = fingerprint, fingerprint

    def __len__(self) -> int:
        return len(self.ids)


def a_set(shards: list[int], fingerprint: str = "") -> ShardIndex:
    return cast(ShardIndex, FakeIndex(shards, fingerprint or f"set {next(_count)}"))


_count = itertools.count()
layouts = st.lists(st.integers(1, 9), min_size=1, max_size=5)
mixtures = st.lists(st.tuples(layouts, st.integers(1, 6)), min_size=1, max_size=4)


def mixed(sets: list[tuple[list[int], int]]) -> Mixture:
    return Mixture([a_set(shards) for shards, _ in sets], [weight for _, weight in sets])


@settings(max_examples=50, deadline=None)
@given(sets=mixtures, seed=st.integers(0, 2**63), window=st.none() | st.integers(1, 4), length=st.integers(1, 400))
def test_every_set_comes_once_in_each_of_its_own_epochs(
    sets: list[tuple[list[int], int]], seed: int, window: int | None, length: int
) -> None:
    mixture = mixed(sets)
    blocks = sum(mixture.weights)
    epochs, samples = MixedOrder(mixture, seed, window).at(0, length * blocks)
    for number in range(len(sets)):
        low, high = mixture.offsets[number : number + 2]
        own = (samples >= low) & (samples < high)
        events = Counter(zip(epochs[own].tolist(), samples[own].tolist(), strict=True))
        assert set(events.values()) <= {1}
        whole = own.sum() // (high - low)  # epochs of this set that are over
        for epoch in range(whole):
            assert sum(1 for e, _ in events if e == epoch) == high - low


@settings(max_examples=50, deadline=None)
@given(sets=mixtures, seed=st.integers(0, 2**63), blocks=st.integers(1, 40))
def test_every_block_holds_the_sets_in_the_proportion_of_their_weights(
    sets: list[tuple[list[int], int]], seed: int, blocks: int
) -> None:
    mixture = mixed(sets)
    block = sum(mixture.weights)
    samples = MixedOrder(mixture, seed).at(0, block * blocks)[1]
    parts = np.searchsorted(mixture.offsets, samples, side="right") - 1
    for row in parts.reshape(blocks, block):
        assert np.bincount(row, minlength=len(sets)).tolist() == mixture.weights


@settings(max_examples=50, deadline=None)
@given(sets=mixtures, seed=st.integers(0, 2**63), start=st.integers(0, 300), length=st.integers(0, 60))
def test_any_start_gives_the_same_stream(sets: list[tuple[list[int], int]], seed: int, start: int, length: int) -> None:
    whole = MixedOrder(mixed(sets), seed).at(0, start + length)
    part = MixedOrder(mixed(sets), seed).at(start, start + length)
    assert [column.tolist() for column in part] == [column[start:].tolist() for column in whole]


@settings(max_examples=50, deadline=None)
@given(sets=mixtures, seed=st.integers(0, 2**63))
def test_an_epoch_is_the_shortest_in_which_every_pair_has_come(sets: list[tuple[list[int], int]], seed: int) -> None:
    mixture = mixed(sets)
    order, block = MixedOrder(mixture, seed), sum(mixture.weights)
    assert set(order.at(0, mixture.epoch_size)[1].tolist()) == set(range(len(mixture)))
    assert len(set(order.at(0, mixture.epoch_size - block)[1].tolist())) < len(mixture)


def test_a_set_does_not_always_stand_at_the_same_place_of_a_block() -> None:
    samples = MixedOrder(mixed([([50], 1), ([50], 3)]), seed=0).at(0, 4000)[1]
    places = np.bincount(np.flatnonzero(samples < 50) % 4, minlength=4)
    assert (abs(places - 250) < 5 * np.sqrt(250 * 3 / 4)).all()


def test_one_set_alone_keeps_its_order_and_its_fingerprint() -> None:
    mixture = Mixture([a_set([3, 5], "abc")])
    assert mixture.fingerprint == "abc" and mixture.epoch_size == 8
    assert MixedOrder(mixture, seed=3).at(0, 16)[1].tolist() == [4, 7, 2, 6, 5, 3, 0, 1, 3, 1, 5, 2, 4, 7, 6, 0]


def test_weights_are_in_the_fingerprint_up_to_a_common_factor() -> None:
    def fingerprint(*weights: int) -> str:
        return Mixture([a_set([3], "a"), a_set([3], "b")], weights).fingerprint

    assert fingerprint(1, 3) == fingerprint(2, 6)
    assert len({fingerprint(1, 3), fingerprint(3, 1), fingerprint(1, 1)}) == 3


def test_a_weight_below_one_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.train: weight 0"):
        Mixture([a_set([3]), a_set([3])], [1, 0])


def test_one_set_named_twice_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.train: .* hold the same pairs.*name them once, with the weight"):
        Mixture([a_set([3], "a"), a_set([4], "b"), a_set([3], "a")], [1, 1, 2])


@pytest.mark.parametrize("cache", [False, True])
def test_batches_of_two_sets_hold_what_the_sets_hold(shards: Shards, cache: bool) -> None:
    first, second = shards(records(6), "a"), shards(records(9)[6:], "b")
    options: dict[str, Any] = {"tokenize": lengths, "image_size": 20, "augment": None, "cache": cache}
    mixture = Mixture([first, second], [1, 1])
    batches = list(PairLoader(mixture, global_batch=6, steps=4, **options))
    for index, offset in ((first, 0), (second, 6)):
        (whole,) = PairLoader(index, global_batch=len(index), steps=1, **options)
        wanted = {key: row for row, key in enumerate(whole.keys)}
        for batch in batches:
            for row, (key, sample) in enumerate(zip(batch.keys, batch.samples.tolist(), strict=True)):
                if key in wanted:
                    assert mixture.key(sample) == key == index.key(sample - offset)
                    assert batch.pixels[row].equal(whole.pixels[wanted[key]])
                    assert batch.tokens[row].equal(whole.tokens[wanted[key]])
                    assert batch.ids[row] == whole.ids[wanted[key]]
    keys = Counter(key for batch in batches for key in batch.keys)  # 24 places: 2 epochs of six, 4 of three
    assert keys == {item.key: 2 for item in records(6)} | {item.key: 4 for item in records(9)[6:]}


def test_views_of_a_mixture_are_those_of_its_sets(shards: Shards) -> None:
    first, second = shards(records(6), "a"), shards(records(9)[6:], "b")
    mixture = Mixture([first, second])
    assert list(mixture.captions()) == [f"caption {i}" for i in range(9)]
    assert (mixture.record(7).key, mixture.variants(7)) == ("sample-007", ("variant 7",))
    assert mixture.image_ids.tolist() == [*first.image_ids, *second.image_ids]
    assert mixture.shard_of(5).endswith("a/00001.tar") and mixture.shard_of(6).endswith("b/00000.tar")


def train_on_two_sets(rank: int, world: int, corpus: Path, run_dir: Path, kind: str, resume: bool) -> list[float]:
    sets = f"data.train={{{corpus}/shards: 1, {corpus}/more: 3}}"
    overrides = [sets, f"loss.kind={kind}", "train.epochs=0.5", "model.image.kwargs.proj_drop_rate=0.0"]
    config = tiny_config(corpus, run_dir / "run", *overrides, "model.text.dropout=0.0")
    pretrain(config, quiet=True, resume=resume, stop_after=None if resume else 2)
    rows = [json.loads(line) for line in (run_dir / "run" / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def write_more(corpus: Path) -> None:
    """Another set of forty pairs beside the first: one set named twice is refused."""
    pairs = (replace(pair, key=f"more-{pair.key}") for pair in open_source(corpus / "images"))
    write_shards(pairs, corpus / "more")


@pytest.mark.parametrize("kind", ["infonce", "sogclr"])
def test_a_run_on_two_sets_is_the_same_on_one_process_and_two(tmp_path: Path, kind: str) -> None:
    write_corpus(tmp_path / "c")
    write_more(tmp_path / "c")
    for resume in (False, True):
        one = run_ranks(1, train_on_two_sets, tmp_path / "c", tmp_path / "1", kind, resume)[0]
        two = run_ranks(2, train_on_two_sets, tmp_path / "c", tmp_path / "2", kind, resume)[0]
    assert len(one) == 5  # an epoch of the mixture reads the set of weight 1 once: 160 pairs, half of it 80
    assert two == pytest.approx(one, rel=1e-4)


def test_a_batch_larger_than_its_share_of_a_set_is_refused(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c")
    write_more(tmp_path / "c")
    sets = f"data.train={{{tmp_path}/c/shards: 1, {tmp_path}/c/more: 3}}"
    config = tiny_config(tmp_path / "c", tmp_path / "run", sets, "train.global_batch=64")
    with pytest.raises(
        UserError, match="train.global_batch: 64 takes 48 of one set at once, which is more than the 40 pairs of"
    ):
        pretrain(config, quiet=True)

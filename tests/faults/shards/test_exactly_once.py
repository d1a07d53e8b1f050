"""Two epochs of pictograms: every key once an epoch, the same batches and pixels on any processes, through any kill."""

import hashlib
import itertools
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from contrastive.shards import Augment, PairLoader, ShardIndex, open_index, open_source, write_shards
from contrastive.shards.batch import Batch
from tests.distributed.spawn import run_ranks
from tests.shards.conftest import lengths

TABLE = Path(__file__).parents[3] / "data" / "pictograms" / "train.parquet"
AUGMENT = Augment((0.5, 1.0), flip=0.5, rotate=10, color=0.2)
Rows = list[tuple[str, str]]  # of a global batch: each key with a digest of its pixels and tokens


def rows(batch: Batch) -> Rows:
    digests = []
    for pixels, tokens in zip(batch.pixels, batch.tokens, strict=True):
        digests.append(hashlib.blake2b(pixels.numpy().tobytes() + tokens.numpy().tobytes(), digest_size=8).hexdigest())
    return list(zip(batch.keys, digests, strict=True))


def loader(index: ShardIndex, batch: int, steps: int, **options: Any) -> PairLoader:
    return PairLoader(
        index, tokenize=lengths, image_size=32, augment=AUGMENT, global_batch=batch, steps=steps, seed=11, window=3,
        caption_variants=0.5, **options,
    )  # fmt: skip


def with_kills(index: ShardIndex, batch: int, steps: int, ways: list[tuple[int, int]], seed: int) -> list[Rows]:
    """The global batches of a run that is killed at random steps, and goes on on the next (world, workers)."""
    choice, found = random.Random(seed), list[Rows]()
    for world, workers in itertools.cycle(ways):
        start = len(found)
        kill = min(steps, start + choice.randint(1, max(1, steps // 2)))
        options = {"world": world, "workers": workers, "start_step": start}
        ranks = [iter(loader(index, batch, steps, rank=rank, **options)) for rank in range(world)]
        found += [[row for rank in ranks for row in rows(next(rank))] for _ in range(start, kill)]
        for rank in ranks:
            getattr(rank, "close", lambda: None)()
        if len(found) == steps:
            return found
    raise AssertionError


def exactly_once(index: ShardIndex, batch: int, ways: list[tuple[int, int]]) -> None:
    size = len(index)
    steps = -(-2 * size // batch)
    plain = [rows(one) for one in loader(index, batch, steps)]
    stream = [key for one in plain for key, _ in one][: 2 * size]
    for epoch in (stream[:size], stream[size:]):
        assert Counter(epoch) == Counter(index.key(i) for i in range(size))
    assert stream[:size] != stream[size:]
    for number in range(len(ways)):
        assert with_kills(index, batch, steps, ways[number:] + ways[:number], seed=number) == plain


@pytest.fixture(scope="module")
def some(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    folder = tmp_path_factory.mktemp("some") / "shards"
    write_shards(itertools.islice(open_source(TABLE), 2000), folder, samples_per_shard=300)
    return open_index(folder)


def test_two_epochs_of_2000_pictograms_come_exactly_once_through_kills(some: ShardIndex) -> None:
    exactly_once(some, batch=64, ways=[(1, 0), (2, 1), (4, 0), (1, 4), (2, 0), (4, 1)])


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 1, 4])
def test_two_epochs_of_all_pictograms_come_exactly_once_through_kills(tmp_path: Path, world: int, workers: int) -> None:
    write_shards(open_source(TABLE), tmp_path / "shards")
    exactly_once(open_index(tmp_path / "shards"), batch=256, ways=[(world, workers)])


def of_a_rank(rank: int, world: int, folder: Path, workers: int) -> list[Rows]:
    index = open_index(folder)
    found = []
    for batch in loader(index, 64, 20, rank=rank, world=world, workers=workers):
        gathered: list[Any] = [None] * world
        dist.all_gather_object(gathered, rows(batch))
        found.append([row for part in gathered for row in part])
    return found


@pytest.mark.parametrize("workers", [0, 1])
def test_gloo_processes_have_the_batches_of_one(some: ShardIndex, workers: int) -> None:
    plain = [rows(batch) for batch in loader(some, 64, 20)]
    assert run_ranks(2, of_a_rank, some.folder, workers) == [plain, plain]

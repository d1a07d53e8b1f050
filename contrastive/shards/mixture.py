"""Several data sets as one, each as often as its weight says, in an order that is a pure function of the position.

The stream is made of blocks of as many positions as the weights add up to (1 and 3: blocks of four). A block holds each
set as often as its weight says, in an order drawn by the hash. Every set walks through its own epochs: each of its
pairs comes exactly once before any of them comes again, whatever the other sets do.
"""

import bisect
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from contrastive.errors import UserError
from contrastive.shards.index import ShardIndex
from contrastive.shards.order import Order, hash64, local_batch
from contrastive.shards.record import Record

_MIX = 0x6D6978  # "mix": apart from the other uses of one seed


class Mixture:
    """One or more indexes as one: sample i of set j has the number offsets[j] + i.

    weights: whole numbers of at least 1, one a set; [1, 3] and [2, 6] are the same. None: one set, or all alike.

    parts, offsets: the indexes, and int64 (sets + 1,).
    ids, image_ids, fingerprint, rejected: as in `ShardIndex`; the fingerprint of one set alone is its own.
    repeats_images: some image occurs twice, in one set or in two.
    epoch_size: an epoch of the mixture, in pairs: the fewest whole blocks in which every pair of every set has come at
        least once. That is the size of a set alone. Of several, the set with the most pairs for its weight is read
        once, the others more often.
    """

    def __init__(self, parts: Sequence[ShardIndex], weights: Sequence[int] | None = None) -> None:
        weights = [1] * len(parts) if weights is None else list(weights)
        assert parts and len(parts) == len(weights)
        for weight in weights:
            if weight < 1:
                raise UserError(f"data.train: weight {weight}; give whole numbers of at least 1, or leave the set out")
        for j, part in enumerate(parts):
            for other in parts[:j]:
                if part.fingerprint == other.fingerprint:
                    raise UserError(
                        f"data.train: {other.folder} and {part.folder} hold the same pairs, which would be "
                        "each other's negatives; name them once, with the weight that you want"
                    )
        divisor = math.gcd(*weights)
        self.parts, self.weights = list(parts), [weight // divisor for weight in weights]
        self.offsets = np.cumsum([0, *map(len, parts)], dtype=np.int64)
        self._offsets: list[int] = self.offsets.tolist()
        self.ids: np.ndarray = np.concatenate([part.ids for part in parts])
        self.image_ids: np.ndarray = np.concatenate([part.image_ids for part in parts])
        self.repeats_images = any(part.repeated_images for part in parts) or (
            len(parts) > 1 and len(np.unique(self.image_ids)) < len(self.image_ids)
        )
        self.rejected: dict[str, int] = dict(sum((Counter(part.rejected) for part in parts), Counter()))
        self.fingerprint = "+".join(
            part.fingerprint if len(parts) == 1 else f"{weight}*{part.fingerprint}"
            for part, weight in zip(parts, self.weights, strict=True)
        )
        self.epoch_size = sum(self.weights) * max(
            -(-len(part) // weight) for part, weight in zip(parts, self.weights, strict=True)
        )

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def locate(self, i: int) -> tuple[int, int]:
        """The number of a sample's set, and its number in there."""
        part = bisect.bisect_right(self._offsets, i) - 1
        return part, i - self._offsets[part]

    def pair_ids(self, samples: np.ndarray) -> np.ndarray:
        """The ids of `samples` that a loss takes, see `Batch`: int64 (n,), or (n, 2) where the data repeat an image."""
        ids = self.ids[samples]
        return np.stack([ids, self.image_ids[samples]], axis=1) if self.repeats_images else ids

    def key(self, i: int) -> str:
        """The sample's name; two sets may hold the same one."""
        part, i = self.locate(i)
        return self.parts[part].key(i)

    def image(self, i: int) -> bytes:
        """The encoded bytes of the image."""
        part, i = self.locate(i)
        return self.parts[part].image(i)

    def caption(self, i: int) -> str:
        """The first caption."""
        part, i = self.locate(i)
        return self.parts[part].caption(i)

    def pair(self, i: int) -> tuple[bytes | memoryview, str]:
        """`image` and `caption`, by one read where they lie together."""
        part, i = self.locate(i)
        return self.parts[part].pair(i)

    def captions(self) -> Iterator[str]:
        """The first caption of every sample, in order (to train a tokenizer on)."""
        return itertools.chain.from_iterable(part.captions() for part in self.parts)

    def variants(self, i: int) -> tuple[str, ...]:
        """The captions of a sample besides the first."""
        part, i = self.locate(i)
        return self.parts[part].variants(i)

    def record(self, i: int) -> Record:
        """Everything that the shard holds of sample i."""
        part, i = self.locate(i)
        return self.parts[part].record(i)

    def shard_of(self, i: int) -> str:
        """The path of the shard that holds a sample."""
        part, i = self.locate(i)
        return str(self.parts[part].shards[int(self.parts[part].shard[i])])


def as_mixture(index: ShardIndex | Mixture) -> Mixture:
    """`index`, if it is no mixture as a mixture of one set."""
    return index if isinstance(index, Mixture) else Mixture([index])


class MixedOrder:
    """The endless stream of samples of a mixture; that of one set is its `Order`."""

    def __init__(self, mixture: Mixture, seed: int, window: int | None = None) -> None:
        self.seed, self.weights, self.offsets = seed, mixture.weights, mixture.offsets
        self.orders = [Order(part.shard_starts, seed, window) for part in mixture.parts]
        self._block = sum(self.weights)
        self._firsts = np.cumsum([0, *self.weights])  # slots of a block, in order of the sets

    def at(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The epochs, each of the sample's own set, and the samples at positions start … stop − 1: two int64 arrays."""
        first, last = start // self._block, -(-stop // self._block)
        blocks = np.arange(first, last, dtype=np.int64)[:, None]
        slots = np.argsort(hash64(_MIX, self.seed, blocks, np.arange(self._block)[None]), axis=1, kind="stable")
        wanted = slice(start - first * self._block, stop - first * self._block)
        blocks, slots = np.broadcast_to(blocks, slots.shape).ravel()[wanted], slots.ravel()[wanted]
        epochs, samples = np.empty(stop - start, np.int64), np.empty(stop - start, np.int64)
        for number, (order, weight) in enumerate(zip(self.orders, self.weights, strict=True)):
            own = (slots >= self._firsts[number]) & (slots < self._firsts[number + 1])
            # slot t of a set's share of block b is place b·weight + t of that set's stream
            epochs[own], found = order.take(blocks[own] * weight + slots[own] - self._firsts[number])
            samples[own] = found + self.offsets[number]
        return epochs, samples

    def step(self, step: int, global_batch: int, rank: int = 0, world: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """The epochs and the samples of a rank's slice of a step: two int64 (global_batch / world,)."""
        local = local_batch(global_batch, world)
        start = step * global_batch + rank * local
        return self.at(start, start + local)

"""Which samples make step s: a pure function of the seed, the epoch and the step.

The stream of samples is the concatenation of the epochs' permutations. Step s takes its positions from s·B to
(s+1)·B − 1, so that every epoch is seen exactly once and a batch may straddle two. Nothing here depends on
a library's random stream, on the number of workers or on the number of processes.
"""

import functools

import numpy as np

from contrastive.errors import UserError

_MASK = (1 << 64) - 1
_ORDER, _DRAW = (
    0x6F72646572,
    0x64726177,
)  # "order", "draw": keeps the two uses of one seed apart


def hash64(*words: int | np.ndarray) -> np.ndarray:
    """A 64-bit hash of the words, broadcast together: splitmix64 (Steele et al. 2014), chained."""
    state = np.zeros(1, np.uint64)  # an array, since numpy warns when a scalar wraps around
    for word in words:
        number = np.uint64(word & _MASK) if isinstance(word, int) else word.astype(np.uint64)
        state = (state ^ number) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state


def draws(seed: int, epochs: np.ndarray, samples: np.ndarray, count: int) -> np.ndarray:
    """Uniform numbers in [0, 1), shape (n, count), from seed, epoch, sample and column only."""
    bits = hash64(_DRAW, seed, epochs[:, None], samples[:, None], np.arange(count)[None])
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


@functools.lru_cache(maxsize=2)  # a batch straddles at most two epochs, unless it is larger than an epoch
def permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    """The order of one epoch: int64 (size,), every sample once."""
    order = np.argsort(hash64(_ORDER, seed, epoch, np.arange(size)), kind="stable")
    order.setflags(write=False)
    return order


class Order:
    """The endless stream of samples of a data set with `size` samples."""

    def __init__(self, size: int, seed: int) -> None:
        assert size > 0
        self.size, self.seed = size, seed

    def at(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The epochs and the samples at positions start … stop − 1 of the stream: two int64 arrays."""
        epochs = np.arange(start, stop) // self.size
        samples = np.empty(stop - start, np.int64)
        for epoch in range(start // self.size, -(-stop // self.size)):
            first, last = (
                max(start, epoch * self.size),
                min(stop, (epoch + 1) * self.size),
            )
            part = permutation(self.size, self.seed, epoch)[first - epoch * self.size : last - epoch * self.size]
            samples[first - start : last - start] = part
        return epochs, samples

    def step(self, step: int, global_batch: int, rank: int = 0, world: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """The epochs and the samples of a rank's slice of a step: two int64 (global_batch / world,)."""
        local = local_batch(global_batch, world)
        start = step * global_batch + rank * local
        return self.at(start, start + local)


def local_batch(global_batch: int, world: int) -> int:
    """The samples of one process; UserError where the global batch does not divide."""
    if global_batch < 1 or global_batch % world:
        down = max(global_batch // world, 1) * world
        near = f"{down} or {down + world}" if global_batch > world else str(world)
        raise UserError(f"global_batch {global_batch} is not divisible by {world} processes; use {near}")
    return global_batch // world

"""Which samples make step s: a pure function of the seed, the epoch and the step.

An epoch shuffles the shards, cuts them into windows of K shards, and shuffles the samples inside each window. The
stream of samples is the concatenation of the epochs. Step s takes its positions from s·B to (s+1)·B − 1, so that every
epoch is seen exactly once and a batch may straddle two. Nothing here depends on a library's random stream, on the
number of workers or on the number of processes.

Any position costs the time and memory of one window, wherever it lies: there is nothing to replay after a restart.
"""

import numpy as np

from contrastive.errors import UserError

_MASK = (1 << 64) - 1
_ORDER, _DRAW, _SHARDS = (0x6F72646572, 0x64726177, 0x736861726473)  # "order", "draw", "shards": uses of one seed apart


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


def by_hash(numbers: np.ndarray, *words: int) -> np.ndarray:
    """The numbers, ordered by their hash behind `words`; equal hashes (none are known) in the order given."""
    return numbers[np.argsort(hash64(*words, numbers), kind="stable")]


class Order:
    """The endless stream of samples of a data set.

    shard_starts: int64 (S + 1,), the number of the first sample of each shard, and of all samples.
    window: K, how many shards are mixed with each other; None for all. A set of at most K shards is shuffled as a
    whole. Memory: 8 bytes a shard and 8 a sample of the windows in use.
    """

    def __init__(self, shard_starts: np.ndarray, seed: int, window: int | None = None) -> None:
        self.starts = np.asarray(shard_starts, np.int64)
        self.size, self.seed = int(self.starts[-1]), seed
        assert self.size > 0
        shards = len(self.starts) - 1
        self.window = shards if window is None else min(window, shards)
        self._plans: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._windows: dict[tuple[int, int], np.ndarray] = {}

    def take(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The epochs and the samples at these positions (n,) of the stream: two int64 (n,)."""
        epochs, places = np.divmod(positions, self.size)
        samples = np.empty(len(positions), np.int64)
        for epoch in np.unique(epochs).tolist():
            here = np.flatnonzero(epochs == epoch)
            ends = self._plan(epoch)[1]
            windows = np.searchsorted(ends, places[here], side="right")
            for window in np.unique(windows).tolist():
                rows = here[windows == window]
                samples[rows] = self._samples(epoch, window)[places[rows] - (ends[window - 1] if window else 0)]
        return epochs, samples

    def at(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The epochs and the samples at positions start … stop − 1 of the stream: two int64 arrays."""
        return self.take(np.arange(start, stop, dtype=np.int64))

    def _plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in the order of an epoch, and the position behind each window."""
        if epoch not in self._plans:
            shards = by_hash(np.arange(len(self.starts) - 1), _SHARDS, self.seed, epoch)
            sizes = np.diff(self.starts)[shards]
            ends = np.cumsum(np.add.reduceat(sizes, np.arange(0, len(shards), self.window)))
            _keep(self._plans, epoch, (shards, ends), most=2)
        return self._plans[epoch]

    def _samples(self, epoch: int, window: int) -> np.ndarray:
        """The samples of a window in the order of an epoch."""
        if (epoch, window) not in self._windows:
            shards = np.sort(self._plan(epoch)[0][window * self.window : (window + 1) * self.window])
            members = np.concatenate([np.arange(self.starts[s], self.starts[s + 1]) for s in shards])
            _keep(self._windows, (epoch, window), by_hash(members, _ORDER, self.seed, epoch), most=4)
        return self._windows[epoch, window]


def _keep(cache: dict, key: object, value: object, most: int) -> None:
    """Put a value into a cache, and the oldest one out of a full one."""
    if len(cache) >= most:
        del cache[next(iter(cache))]
    cache[key] = value


def local_batch(global_batch: int, world: int) -> int:
    """The samples of one process; UserError where the global batch does not divide."""
    if global_batch < 1 or global_batch % world:
        down = max(global_batch // world, 1) * world
        near = f"{down} or {down + world}" if global_batch > world else str(world)
        raise UserError(f"train.global_batch {global_batch} is not divisible by {world} processes; use {near}")
    return global_batch // world

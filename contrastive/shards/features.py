"""Batches of features that were computed once, for towers whose trunks do not change."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from contrastive.shards.batch import Batch, Rejection
from contrastive.shards.index import ShardIndex
from contrastive.shards.loader import Place
from contrastive.shards.mixture import Mixture, as_mixture


class FeatureLoader:
    """The batches of a `PairLoader` without augmentation, with features in place of pixels and tokens.

    The order is the same function of (seed, epoch, step). image: float32 (N, F) and text: float32 (N, E), rows as in
    the index. rejected: sample → why it has no features.
    """

    def __init__(
        self,
        index: ShardIndex | Mixture,
        image: np.ndarray,
        text: np.ndarray,
        rejected: Mapping[int, str],
        *,
        global_batch: int,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        window: int | None = None,
        start_step: int = 0,
    ) -> None:
        assert len(image) == len(text) == len(index)
        self.mixture, self.image, self.text, self.rejected = as_mixture(index), image, text, rejected
        self.start_step = start_step
        self.place = Place(self.mixture, global_batch, rank, world, seed, window)
        self.identity: dict[str, Any] = {**self.place.identity, "transform": "features"}

    def state(self, step: int) -> dict[str, Any]:
        """As `PairLoader.state`."""
        return {**self.identity, **self.place.position(step)}

    def __iter__(self) -> Iterator[Batch]:
        return map(self._batch, itertools.count(self.start_step))

    def _batch(self, step: int) -> Batch:
        epochs, samples = self.place.at(step)
        keys = [self.mixture.key(i) for i in samples.tolist()]
        rejected = [
            Rejection(epoch, self.mixture.shard_of(i), key, self.rejected[i])
            for epoch, i, key in zip(epochs.tolist(), samples.tolist(), keys, strict=True)
            if i in self.rejected
        ]
        return Batch(
            pixels=torch.from_numpy(self.image[samples]),
            tokens=torch.from_numpy(self.text[samples]),
            ids=torch.from_numpy(self.mixture.pair_ids(samples)),
            samples=torch.from_numpy(samples),
            valid=torch.tensor([i not in self.rejected for i in samples.tolist()]),
            keys=keys,
            rejected=rejected,
        )

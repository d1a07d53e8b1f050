"""Batches of features that were computed once, for towers whose trunks do not change."""

import itertools
from collections.abc import Iterator

import numpy as np
import torch

from contrastive.shards.batch import Batch
from contrastive.shards.index import ShardIndex
from contrastive.shards.order import Order, local_batch


class FeatureLoader:
    """The batches of a `PairLoader` without augmentation, with features in place of pixels and tokens.

    The order is the same function of (seed, epoch, step). image: float32 (N, F) and text: float32 (N, E), rows as in
    the index. valid: bool (N,), False for a sample whose image could not be read.
    """

    def __init__(
        self,
        index: ShardIndex,
        image: np.ndarray,
        text: np.ndarray,
        valid: np.ndarray,
        *,
        global_batch: int,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        start_step: int = 0,
    ) -> None:
        assert len(image) == len(text) == len(valid) == len(index)
        local_batch(global_batch, world)
        self.index, self.image, self.text, self.valid = index, image, text, valid
        self.global_batch, self.rank, self.world, self.start_step = global_batch, rank, world, start_step
        self.order = Order(len(index), seed)

    def __iter__(self) -> Iterator[Batch]:
        for step in itertools.count(self.start_step):
            _, samples = self.order.step(step, self.global_batch, self.rank, self.world)
            valid = torch.from_numpy(self.valid[samples])
            yield Batch(
                pixels=torch.from_numpy(self.image[samples]),
                tokens=torch.from_numpy(self.text[samples]),
                ids=torch.from_numpy(self.index.ids[samples]),
                samples=torch.from_numpy(samples),
                valid=valid,
                keys=[self.index.key(i) for i in samples.tolist()],
                rejected={} if bool(valid.all()) else {"unreadable image": int((~valid).sum())},
            )

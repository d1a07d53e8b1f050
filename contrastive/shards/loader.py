"""The training loader: step s of rank r is the same batch, whoever computes it and whenever."""

import itertools
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from contrastive.errors import UserError
from contrastive.shards.augment import DRAWS, Augment
from contrastive.shards.batch import Batch
from contrastive.shards.cache import open_cache
from contrastive.shards.index import ShardIndex, caption_id
from contrastive.shards.order import Order, draws, local_batch
from contrastive.shards.record import Rejected
from contrastive.shards.render import render, render_image

Tokenize = Callable[[list[str]], Any]


class PairLoader:
    """Batches of image-text pairs, in an order that is a pure function of (seed, epoch, step).

    tokenize: list of n captions → int64 (n, length), a tensor or an array.
    image_size: height and width of the pixels. augment: None for the evaluation transform.
    global_batch: samples of all processes together; rank r of `world` gets the r-th contiguous slice.
    workers: processes that prepare batches; 0 does it in this one.
    start_step, steps: the steps start_step … steps − 1 of the run are yielded; None: no end.
    caption_variants: probability that one of a sample's further captions is used.
    cache: decode every image once, and keep the pixels beside the shards (images of one size only).
    mean_fill: grey value of the corners that a rotation uncovers.

    Every number drawn for a sample depends on (seed, epoch, sample) only: never on workers, processes or the
    start. Raises UserError for a batch that does not divide and for a cache of images that differ in size.
    """

    def __init__(
        self,
        index: ShardIndex,
        *,
        tokenize: Tokenize,
        image_size: int,
        augment: Augment | None,
        global_batch: int,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        workers: int = 0,
        start_step: int = 0,
        steps: int | None = None,
        caption_variants: float = 0.0,
        cache: bool = False,
        mean_fill: int = 255,
    ) -> None:
        if not 0 <= caption_variants <= 1:
            raise UserError(f"caption_variants {caption_variants}: give a probability from 0 to 1")
        local_batch(global_batch, world)
        self.workers, self.start_step, self.steps = workers, start_step, steps
        self.steps_per_epoch = len(index) / global_batch
        self._dataset = _Steps(
            index,
            tokenize,
            image_size,
            augment,
            global_batch,
            rank,
            world,
            seed,
            caption_variants,
            cache,
            mean_fill,
        )

    def __iter__(self) -> Iterator[Batch]:
        steps = itertools.count(self.start_step) if self.steps is None else range(self.start_step, self.steps)
        if not self.workers:
            yield from map(self._dataset.__getitem__, steps)
            return
        try:
            yield from self._from_workers(steps)
        except UserError as error:
            # torch wraps what a worker raises in its traceback; the last line is what the user can mend
            raise UserError(
                str(error).strip().splitlines()[-1].removeprefix(f"{UserError.__module__}.UserError: ")
            ) from None

    def _from_workers(self, steps: Iterable[int]) -> Iterator[Batch]:
        yield from DataLoader(
            self._dataset,
            sampler=steps,
            batch_size=None,  # one item is a whole batch already
            num_workers=self.workers,
            collate_fn=_unchanged,
            worker_init_fn=_start_worker,
            prefetch_factor=2,
            generator=torch.Generator(),  # else the workers' seed is drawn from the model's random stream
        )


class _Steps(Dataset[Batch]):
    """A map-style data set whose item i is the local batch of step i."""

    def __init__(
        self,
        index: ShardIndex,
        tokenize: Tokenize,
        image_size: int,
        augment: Augment | None,
        global_batch: int,
        rank: int,
        world: int,
        seed: int,
        caption_variants: float,
        cache: bool,
        mean_fill: int,
    ) -> None:
        self.index, self.tokenize, self.size, self.augment = (
            index,
            tokenize,
            image_size,
            augment,
        )
        self.global_batch, self.rank, self.world, self.seed = (
            global_batch,
            rank,
            world,
            seed,
        )
        self.caption_variants, self.fill = caption_variants, mean_fill
        self.order = Order(len(index), seed)
        self.cache = open_cache(index) if cache else None

    def __getitem__(self, step: int) -> Batch:
        epochs, samples = self.order.step(step, self.global_batch, self.rank, self.world)
        numbers = draws(self.seed, epochs, samples, DRAWS + 2).tolist()
        pixels = np.zeros((len(samples), self.size, self.size, 3), np.uint8)
        valid = np.zeros(len(samples), bool)
        captions = [""] * len(samples)
        ids = self.index.ids[samples].copy()
        rejected: Counter[str] = Counter()
        for row, (sample, u) in enumerate(zip(samples.tolist(), numbers, strict=True)):
            try:
                pixels[row] = self._pixels(sample, u)
            except Rejected as fault:
                rejected[fault.reason] += 1
                continue
            variant = self._variant(sample, u[DRAWS], u[DRAWS + 1])
            captions[row] = self.index.caption(sample) if variant is None else variant
            if variant is not None:
                ids[row] = caption_id(variant)
            valid[row] = True
        return Batch(
            pixels=torch.from_numpy(pixels).permute(0, 3, 1, 2),
            tokens=torch.as_tensor(self.tokenize(captions), dtype=torch.int64),
            ids=torch.from_numpy(ids),
            samples=torch.from_numpy(samples),
            valid=torch.from_numpy(valid),
            keys=[self.index.key(i) for i in samples.tolist()],
            rejected=dict(rejected),
        )

    def _pixels(self, sample: int, u: list[float]) -> np.ndarray:
        if self.cache is None:
            return render(self.index.image(sample), self.size, self.augment, u, self.fill)
        if sample in self.cache.rejected:
            raise Rejected(self.cache.rejected[sample])
        return render_image(Image.fromarray(self.cache.pixels[sample]), self.size, self.augment, u, self.fill)

    def _variant(self, sample: int, chance: float, which: float) -> str | None:
        """One of the sample's further captions, with the wanted probability; None for its first one."""
        if chance < self.caption_variants:
            variants = self.index.variants(sample)
            if variants:
                return variants[int(which * len(variants))]
        return None


def _unchanged(batch: Any) -> Any:
    return batch


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)  # the training step needs the cores
    os.nice(5)  # and goes first: on few cores a step waits for its slowest thread, and prefetching hides ours
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads did not survive the fork
    # The main process decides how to end on Ctrl-C or a scheduler's signal, and may still want batches.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

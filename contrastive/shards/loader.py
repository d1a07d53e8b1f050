"""The training loader: step s of rank r is the same batch, whoever computes it and whenever."""

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch

from contrastive.errors import UserError
from contrastive.preprocessing import Preprocessing
from contrastive.shards.augment import DRAWS, Augment, recolor
from contrastive.shards.batch import Batch, Rejection
from contrastive.shards.cache import open_cache
from contrastive.shards.compiled import recolor as recolor_compiled
from contrastive.shards.compiled import shape_cached
from contrastive.shards.decode import DECODER_VERSION
from contrastive.shards.index import ShardIndex, caption_id
from contrastive.shards.mixture import MixedOrder, Mixture, as_mixture
from contrastive.shards.order import draws, local_batch
from contrastive.shards.record import Rejected
from contrastive.shards.render import render, render_pixels
from contrastive.shards.tokens import CAPTIONS
from contrastive.shards.workers import from_workers, new_bytes

VERSION = 4  # of the order, of the numbers drawn and of what they do: a change of either must not pass for the same run
Tokenize = Callable[[list[str]], Any]
# Of compiled code in a loader's process at most: what else a batch takes is the work of one thread.
THREADS = 4


class PairLoader:
    """Batches of image-text pairs, in an order that is a pure function of (seed, epoch, step).

    index: one set, or a `Mixture` of several.
    tokenize: list of n captions → int64 (n, length), a tensor or an array.
    image_size: height and width of the pixels. augment: None for the evaluation transform.
    preprocessing: the evaluation transform of the model that gets the pixels; None for `centre_square`.
    global_batch: samples of all processes together; rank r of `world` gets the r-th contiguous slice.
    window: shards that are shuffled with each other, see `Order`; None for all.
    workers: processes that prepare batches; 0 does it in this one.
    timeout: seconds after which a batch that a worker has not finished ends the stream.
    start_step, steps: the steps start_step … steps − 1 of the run are yielded; None: no end.
    caption_variants: probability that one of a sample's further captions is used.
    cache: decode every image once, and keep the pixels beside the shards (images of one size only); captions that were
        read are remembered, as many as `TokenCache` does.
    decode: see `render`.
    mean_fill: grey value of the corners that a rotation uncovers.
    compiled: the same pixels by compiled code, see `compile_pixels`, which is called before.

    Every number drawn for a sample depends on (seed, epoch, sample) only: never on workers, processes or the
    start. A sample that cannot be used keeps its place, see `Batch`. Raises UserError for a batch that does not divide,
    for a cache of images that differ in size, and for what `from_workers` tells.
    """

    def __init__(
        self,
        index: ShardIndex | Mixture,
        *,
        tokenize: Tokenize,
        image_size: int,
        augment: Augment | None,
        preprocessing: Preprocessing | None = None,
        global_batch: int,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        window: int | None = None,
        workers: int = 0,
        timeout: float = 600.0,
        start_step: int = 0,
        steps: int | None = None,
        caption_variants: float = 0.0,
        cache: bool = False,
        decode: str = "exact",
        mean_fill: int = 255,
        compiled: bool = False,
    ) -> None:
        if not 0 <= caption_variants <= 1:
            raise UserError(f"caption_variants {caption_variants}: give a probability from 0 to 1")
        self.mixture = as_mixture(index)
        self.place = Place(self.mixture, global_batch, rank, world, seed, window)
        self.workers, self.timeout, self.start_step, self.steps = workers, timeout, start_step, steps
        transform = {
            "image_size": image_size,
            "augment": None if augment is None else {**asdict(augment), "crop": list(augment.crop)},
            "caption_variants": caption_variants,
            "decode": "exact" if cache else decode,
            "mean_fill": mean_fill,
        }
        self.identity: dict[str, Any] = {**self.place.identity, "decoder": DECODER_VERSION, "transform": transform}
        used = preprocessing if augment is None else None
        if used is not None and not (used.plain and used.size[0] == image_size):
            transform["preprocessing"] = used.geometry
        height, width = (image_size, image_size) if used is None else used.size
        self._room = global_batch // world * height * width * 3  # bytes of a batch's pixels
        threads = threads_of(workers, world) if compiled else 0
        self._items = _Steps(self.mixture, self.place, tokenize, transform, augment, used, cache, threads)

    def state(self, step: int) -> dict[str, Any]:
        """All that the batches from this step on depend on, as JSON; see `Place.state`."""
        return {**self.identity, **self.place.position(step)}

    def __iter__(self) -> Iterator[Batch]:
        steps = itertools.count(self.start_step) if self.steps is None else range(self.start_step, self.steps)
        if self.workers:
            return from_workers(self._items, steps, self.workers, self.timeout, self._room)
        return map(self._items.__getitem__, steps)


def threads_of(workers: int, world: int) -> int:
    """Of the compiled code in each loader's process: the cores of this machine shared out, as if all ranks were here.

    A batch is ready sooner (docs/experiments.md), which counts where the step is short, as on a GPU.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(THREADS, cores // (max(1, workers) * world)))


class Place:
    """Which samples a process gets at a step, and how a checkpoint says where a run is.

    identity: what must be equal for a run to go on as if it had never stopped; JSON.
    """

    def __init__(
        self, mixture: Mixture, global_batch: int, rank: int, world: int, seed: int, window: int | None
    ) -> None:
        local_batch(global_batch, world)
        self.order = MixedOrder(mixture, seed, window)
        self.global_batch, self.rank, self.world = global_batch, rank, world
        self.epoch_size = mixture.epoch_size
        self.identity: dict[str, Any] = {
            "version": VERSION,
            "fingerprint": mixture.fingerprint,
            "seed": seed,
            "global_batch": global_batch,
            "window": window,
        }
        if mixture.repeats_images:  # the ids of a batch say so, which changes the loss
            self.identity["ids"] = "captions and images"

    def at(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The epochs and the samples of this process at a step: two int64 (n,)."""
        return self.order.step(step, self.global_batch, self.rank, self.world)

    def position(self, step: int) -> dict[str, int]:
        """Where the stream is before a step: the epoch (as a `Mixture` counts it) and the pairs of it that are done."""
        epoch, cursor = divmod(step * self.global_batch, self.epoch_size)
        return {"epoch": epoch, "cursor": cursor}


class _Steps:
    """Item i is the local batch of step i."""

    def __init__(
        self,
        mixture: Mixture,
        place: Place,
        tokenize: Tokenize,
        transform: dict[str, Any],
        augment: Augment | None,
        preprocessing: Preprocessing | None,
        cache: bool,
        threads: int,
    ) -> None:
        """threads: of compiled code; 0 for none."""
        self.mixture, self.place, self.tokenize, self.augment = mixture, place, tokenize, augment
        self.seed, self.size, self.fill = place.identity["seed"], transform["image_size"], transform["mean_fill"]
        self.preprocessing = preprocessing
        self.shape = (self.size, self.size) if preprocessing is None else preprocessing.size
        self.caption_variants, self.decode = transform["caption_variants"], transform["decode"]
        self.caches = [open_cache(part) for part in mixture.parts] if cache else None
        self.captions: dict[int, str] = {}  # where pixels are cached: what has been read
        self.recolor = partial(recolor_compiled, threads=threads) if threads else recolor
        self.threads = threads
        self.at_once = threads > 0 and cache and augment is not None and augment.rotate == 0

    def __getitem__(self, step: int) -> Batch:
        epochs, samples = self.place.at(step)
        numbers = draws(self.seed, epochs, samples, DRAWS + 2)
        pixels_nhwc = new_bytes(len(samples), *self.shape, 3)
        pixels = pixels_nhwc.numpy()
        valid = np.zeros(len(samples), bool)
        captions = [""] * len(samples)
        ids = self.mixture.pair_ids(samples)
        caption_ids = ids if ids.ndim == 1 else ids[:, 0]  # a view
        keys = [self.mixture.key(i) for i in samples.tolist()]
        rejected = []
        if self.at_once:
            self._shape_cached(pixels, samples, numbers)
        for row, (sample, u) in enumerate(zip(samples.tolist(), numbers.tolist(), strict=True)):
            try:
                variant = self._variant(sample, u[DRAWS], u[DRAWS + 1])
                shaped, first = self._pair(sample, u)
                if shaped is not None:
                    pixels[row] = shaped
                captions[row] = first if variant is None else variant
            except Rejected as fault:
                pixels[row], captions[row] = 0, ""
                rejected.append(Rejection(int(epochs[row]), self.mixture.shard_of(sample), keys[row], fault.reason))
                continue
            if variant is not None:
                caption_ids[row] = caption_id(variant)
            valid[row] = True
        if self.augment is not None:
            self.recolor(pixels, self.augment, numbers)
        return Batch(
            pixels=pixels_nhwc.permute(0, 3, 1, 2),
            tokens=torch.as_tensor(self.tokenize(captions), dtype=torch.int64),
            ids=torch.from_numpy(ids),
            samples=torch.from_numpy(samples),
            valid=torch.from_numpy(valid),
            keys=keys,
            rejected=rejected,
        )

    def _shape_cached(self, pixels: np.ndarray, samples: np.ndarray, numbers: np.ndarray) -> None:
        assert self.caches is not None and self.augment is not None
        for cache, first, end in zip(self.caches, self.mixture.offsets[:-1], self.mixture.offsets[1:], strict=True):
            own = (first <= samples) & (samples < end)
            places = np.where(own, samples - first, -1)
            shape_cached(cache.pixels, places, self.augment, numbers, pixels, self.threads)

    def _pair(self, sample: int, u: list[float]) -> tuple[np.ndarray | None, str]:
        """Pixels and first caption of a sample; None for pixels that are in the batch already."""
        if self.caches is None:
            image, caption = self.mixture.pair(sample)
            return render(image, self.size, self.augment, u, self.fill, self.decode, self.preprocessing), caption
        part, i = self.mixture.locate(sample)
        cache = self.caches[part]
        if i in cache.rejected:
            raise Rejected(cache.rejected[i])
        caption = self._remembered_caption(sample)
        if self.at_once:
            return None, caption
        return render_pixels(cache.pixels[i], self.size, self.augment, u, self.fill, self.preprocessing), caption

    def _remembered_caption(self, sample: int) -> str:
        known = self.captions.get(sample)
        if known is not None:
            return known
        caption = self.mixture.caption(sample)
        # Nothing is forgotten to make room: of samples in random order none is more likely to come again than another.
        if len(self.captions) < CAPTIONS:
            self.captions[sample] = caption
        return caption

    def _variant(self, sample: int, chance: float, which: float) -> str | None:
        """One of the sample's further captions, with the wanted probability; None for its first one."""
        if chance < self.caption_variants:
            variants = self.mixture.variants(sample)
            if variants:
                return variants[int(which * len(variants))]
        return None

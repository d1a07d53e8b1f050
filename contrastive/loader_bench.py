"""Which part of feeding a model is the bottleneck on this machine, and how many loader workers are wanted?

Every part is measured alone and then the whole, in samples a second. The parts of one worker follow one another, so
that their times add up; workers do them side by side, as long as there are cores.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from contrastive.build import build_augment, build_data, build_model, token_cache, uses_compiled, wants_training
from contrastive.config import Config
from contrastive.errors import UserError
from contrastive.models import OpenClipTokenizer, train_tokenizer
from contrastive.shards import Augment, Mixture, PairLoader, Rejected, TokenCache, open_index
from contrastive.shards.augment import DRAWS, recolor
from contrastive.shards.compiled import recolor as recolor_compiled
from contrastive.shards.decode import decode_pixels
from contrastive.shards.render import render

BATCH = 64  # samples of a batch, where no recipe says
AT_ONCE = 64  # images that are changed together
LARGEST = 4096  # pixels of a side
LOOK_AT = 512  # samples that the parts are measured on, over and over: they are read from memory after the first time


@dataclass(frozen=True)
class Measured:
    """What was measured, and its samples a second."""

    name: str
    rate: float


@dataclass(frozen=True)
class Verdict:
    """bottleneck: disk, decoding, transform, tokenizing or the model. workers: how many keep the model busy."""

    bottleneck: str
    workers: int | None
    text: str


def bench_shards(
    shards: str, *, size: int, decode: str, seconds: float, workers: list[int]
) -> Iterator[Measured | Verdict]:
    """The loader of a folder of shards, with open_clip's tokenizer and a light crop; no model."""
    tokenizer = OpenClipTokenizer()
    yield from _bench(
        Mixture([open_index(shards)]), TokenCache(tokenizer, tokenizer.pad_id), tokenizer, size, BATCH,
        Augment(crop=(0.9, 1.0)), decode, False, seconds, workers, None,
    )  # fmt: skip


def bench_recipe(config: Config, *, seconds: float, workers: list[int]) -> Iterator[Measured | Verdict]:
    """The loader of a recipe, and its towers' forward and backward on a batch that is there already."""
    data = build_data(config)
    choice, trained = wants_training(config), ""
    if choice is not None:
        trained = train_tokenizer(data.captions(), choice.vocab_size, choice.lowercase).to_str()
    model = build_model(config, trained)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    assert device is not None
    model.to(device)
    batch = config.train.global_batch
    chunk = min(batch, config.train.chunk or batch)

    def step(example: Any) -> int:
        pixels, tokens = example.pixels[:chunk].to(device), example.tokens[:chunk].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision in ("auto", "bf16")):
            image, text = model.encode_image(pixels), model.encode_text(tokens)
        (image.float() @ text.float().T).logsumexp(dim=1).sum().backward()
        model.zero_grad()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        return len(pixels)

    yield from _bench(
        data, token_cache(model), model.tokenize, model.image_size, batch,
        build_augment(config), config.data.decode, uses_compiled(config), seconds, workers, step,
    )  # fmt: skip


def _bench(
    data: Mixture,
    cached: TokenCache,
    tokenize: Callable[[list[str]], Any],
    size: int,
    batch: int,
    augment: Augment,
    decode: str,
    compiled: bool,
    seconds: float,
    workers: list[int],
    step: Callable[[Any], int] | None,
) -> Iterator[Measured | Verdict]:
    if not 0 < seconds < math.inf or min(workers) < 0:
        raise UserError(f"--seconds {seconds:g}, --workers {workers}: give seconds above 0 and workers from 0 up")
    if not 1 <= size <= LARGEST:
        raise UserError(f"--size {size}: give pixels from 1 to {LARGEST}")
    numbers = range(0, len(data), max(1, len(data) // LOOK_AT))
    try:
        pairs = [data.pair(i) for i in numbers]
    except Rejected as fault:
        raise UserError(f"the shards: {fault.reason}; see `contrastive check`") from None
    bad = sum(_is_bad(image) for image, _ in pairs)
    if bad == len(pairs):
        raise UserError(f"not one of the {bad} images looked at can be decoded; `contrastive check` says why")
    if bad:
        yield Verdict(
            "", 0, f"note: {bad} of the {len(pairs)} images looked at cannot be decoded; see `contrastive check`"
        )
    draws = np.random.default_rng(0).random((min(batch, AT_ONCE), DRAWS))
    pixels = np.empty((len(draws), size, size, 3), np.uint8)
    places = iter(_endless(list(numbers)))
    images, captions = iter(_endless([image for image, _ in pairs])), iter(_endless([text for _, text in pairs]))

    def decoded() -> int:
        try:
            decode_pixels(next(images))
        except Rejected:
            pass  # a bad one costs time too
        return 1

    def rendered() -> int:
        for row, u in enumerate(draws.tolist()):
            try:
                pixels[row] = render(next(images), size, augment, u, decode=decode)
            except Rejected:
                pass
        (recolor_compiled if compiled else recolor)(pixels, augment, draws)
        return len(draws)

    def tokenized() -> int:
        tokenize([next(captions) for _ in range(batch)])
        return batch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    parts = {
        "disk": _rate(lambda: len(data.pair(next(places))[:1]), seconds),
        "decoding": _rate(decoded, seconds),
        "decoding and transform": _rate(rendered, seconds),
        "tokenizing": _rate(tokenized, seconds),
    }
    torch.set_num_threads(threads)
    for name, rate in parts.items():
        yield Measured(name, rate)
    loaders = {}
    example = None
    for count in workers:
        loader = PairLoader(
            data, tokenize=cached, image_size=size, augment=augment, global_batch=min(batch, len(data)),
            workers=count, decode=decode, compiled=compiled,
        )  # fmt: skip
        batches = iter(loader)
        example = next(batches)
        for _ in range(2 * count):  # what the workers had ready
            next(batches)
        loaders[count] = _rate(lambda: len(next(batches).keys), seconds)  # noqa: B023  used before the next turn
        batches.close() if hasattr(batches, "close") else None
        yield Measured(f"the loader, {count} worker{'' if count == 1 else 's'}", loaders[count])
    model = None
    if step is not None:
        model = _rate(lambda: step(example), seconds)
        yield Measured("the model, forward and backward", model)
    yield _verdict(parts, loaders, model)


def _verdict(parts: dict[str, float], loaders: dict[int, float], model: float | None) -> Verdict:
    seconds = {
        "disk": 1 / parts["disk"],
        "decoding": 1 / parts["decoding"],
        "transform": max(0.0, 1 / parts["decoding and transform"] - 1 / parts["decoding"]),
        "tokenizing": 1 / parts["tokenizing"],
    }
    slowest = max(seconds, key=lambda name: seconds[name])
    best = max(loaders, key=lambda count: loaders[count])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if model is None:
        text = f"{slowest} takes most of the loader's time; {best} workers were fastest here, of {cores} cores"
        return Verdict(slowest, best, text)
    alone = 1 / sum(seconds.values())  # of one worker
    wanted = max(1, -(-int(model) // max(1, int(alone))))
    if loaders[best] >= model:
        text = f"the model is the bottleneck; workers wanted: {wanted}"
        return Verdict("the model", wanted, text)
    text = f"{slowest} is the bottleneck: the model could take {model:,.0f} samples a second; workers wanted: {wanted}"
    if wanted > cores:
        text += f", but there are {cores} cores: shrink the images once (`contrastive shard --resize`), or decode: fast"
    return Verdict(slowest, wanted, text)


def _is_bad(image: bytes | memoryview) -> bool:
    try:
        decode_pixels(image)
    except Rejected:
        return True
    return False


def _endless(items: list[Any]) -> Iterator[Any]:
    while True:
        yield from items


def _rate(work: Callable[[], int], seconds: float) -> float:
    """Samples a second of a function that returns how many it did; its first call does not count."""
    work()
    done, started = 0, time.perf_counter()
    while (passed := time.perf_counter() - started) < seconds:
        done += work()
    return done / passed

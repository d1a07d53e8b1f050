"""Images to look at: what a caption finds, what was right, what was wrong, and what was most wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from contrastive.evaluation.embed import Embeddings
from contrastive.evaluation.items import Images, open_images
from contrastive.evaluation.retrieval import best_hits
from contrastive.printable import printable
from contrastive.shards import Rejected, ShardIndex, decode_image


@dataclass(frozen=True)
class Case:
    """One image, its name, and the likeliest names with their probabilities, best first."""

    image: Image.Image
    truth: str
    guesses: list[tuple[str, float]]


@dataclass(frozen=True)
class Hits:
    """The images that one caption finds: `(image, its own caption, is it right)`, best first."""

    caption: str
    images: list[tuple[Image.Image, str, bool]]


@dataclass(frozen=True)
class Examples:
    """Images for the report. worst: those whose wrong answer was the surest, of the task that `worst_of` names."""

    hits: list[Hits] = field(default_factory=list)
    right: list[Case] = field(default_factory=list)
    wrong: list[Case] = field(default_factory=list)
    worst: list[Case] = field(default_factory=list)
    worst_of: str = ""


def draw_examples(
    source: Images,
    found: Embeddings,
    probabilities_NK: NDArray[np.floating],
    names: Sequence[str],
    target_N: NDArray[np.int64],
    count: int,
    *,
    queries_KD: NDArray[np.float32] | None = None,
    task: str = "",
    seed: int = 0,
    invert: bool = False,
) -> Examples:
    """A seeded draw of `count` right and `count` wrong images; further kinds where they are asked for.

    probabilities_NK: of the names. queries_KD: embeddings of the names, to show the best 8 images of `count` of them.
    task: whose probabilities these are, to show the `count` images whose true name it found least probable.
    """
    random = np.random.default_rng(seed)
    best_N = probabilities_NK.argmax(axis=1)
    right, wrong = (
        random.permutation(np.flatnonzero((best_N == target_N) == wanted))[:count] for wanted in (True, False)
    )
    queries, hit_QK = np.empty(0, int), np.empty((0, 8), int)
    if queries_KD is not None:
        queries = random.choice(len(names), size=min(count, len(names)), replace=False)
        hit_QK, _ = best_hits(queries_KD[queries], found.image, 8)
    missed = np.flatnonzero(best_N != target_N) if task else np.empty(0, int)
    missed = missed[np.argsort(probabilities_NK[missed, target_N[missed]], kind="stable")][:count]
    images = _images(source, {found.keys[row] for row in (*right, *wrong, *missed, *hit_QK.ravel())}, invert)

    def case(row: Any) -> Case:
        order = np.argsort(-probabilities_NK[row])[:3]
        guesses = [(names[k], float(probabilities_NK[row, k])) for k in order]
        return Case(images[found.keys[row]], names[target_N[row]], guesses)

    def hit(query: int, rows: NDArray[np.int64]) -> Hits:
        return Hits(
            names[query],
            [(images[found.keys[row]], names[target_N[row]], bool(target_N[row] == query)) for row in rows],
        )

    return Examples(
        hits=[hit(query, rows) for query, rows in zip(queries, hit_QK, strict=True)],
        right=[case(row) for row in right],
        wrong=[case(row) for row in wrong],
        worst=[case(row) for row in missed],
        worst_of=task,
    )


def _images(source: Images, keys: set[str], invert: bool) -> dict[str, Image.Image]:
    """The images with these keys, no larger than 96 pixels: a second pass, that decodes only them."""
    images = {}
    if isinstance(source, ShardIndex):  # random access: the other images are not read
        numbers = [i for i in range(len(source)) if printable(source.key(i)) in keys]
        records: Any = map(source.record, numbers)
    else:
        records = open_images(source)
    for record in records:
        key = printable(record.key)
        if key in keys and record.image is not None:
            try:
                image = decode_image(record.image)
            except Rejected:  # the same key twice, one of them damaged
                continue
            image.thumbnail((96, 96))
            images[key] = ImageOps.invert(image) if invert else image
    return images

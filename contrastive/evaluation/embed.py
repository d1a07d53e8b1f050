"""From images and captions to rows of numbers: one pass over a source, whatever it is.

Legend: N images that could be read, D dimensions, H = W = the model's image size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from contrastive.errors import UserError
from contrastive.evaluation.protocol import Model, inference
from contrastive.images import to_rgb
from contrastive.shards import Record, Rejected, ShardIndex, Source, decode_image, open_source

Images = str | PathLike[str] | Source | ShardIndex | Sequence[Any]
Progress = Callable[[int, int], None]  # images done, images in all


@dataclass(frozen=True)
class Embeddings:
    """Rows of the images that could be read, in the order of the source.

    image: float32 (N, D), one row an image.  text: float32 (N, D) of each image's first caption; None when
    not asked
    for or where an image has no caption.  keys, captions, labels: lists of N; captions ("" where there is
    none) and labels are None when the source has none.  failures: key -> reason, of the images that were left
    out.
    """

    image: NDArray[np.float32]
    text: NDArray[np.float32] | None
    labels: list[str] | None
    keys: list[str]
    captions: list[str] | None
    failures: dict[str, str]

    @property
    def rejected(self) -> dict[str, int]:
        """How many images were left out, by reason."""
        return dict(Counter(self.failures.values()))


@dataclass(frozen=True)
class Extracted:
    """What `extract` found: the features of each function by name, and the records (without image bytes)."""

    features: dict[str, NDArray[Any]]
    records: list[Record]
    failures: dict[str, str]


def embed(
    model: Model,
    source: Images,
    *,
    batch_size: int = 256,
    features: str = "projected",
    workers: int = 0,
    text: bool = True,
    invert: bool = False,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Embeddings:
    """Embed the images of a source, and their first captions.

    Args:
        source: anything that `contrastive.shards.open_source` takes, a `Source`, a `ShardIndex`, or a list of
            PIL images and paths.
        features: "projected" (normalised, comparable with texts) or "tower" (before the projection, for
        probes, of the text tower too). workers: threads that decode ahead; 0 decodes in between.
        text: embed the captions too, if every image has one.
        invert: turn the images into their negatives first (a white drawing on black becomes black on white).
        dtype: see `inference`.

    Raises:
        UserError: the source is wrong or empty, or none of its images can be read.
    """
    if features not in ("projected", "tower"):
        raise UserError(f"features: '{features}' is unknown; use projected or tower")
    encode = model.encode_image if features == "projected" else model.image_features
    found = extract(
        model,
        source,
        {"image": on_pixels(model, encode)},
        batch_size=batch_size,
        workers=workers,
        invert=invert,
        dtype=dtype,
        progress=progress,
    )
    captions = [record.captions[0] if record.captions else "" for record in found.records]
    labels = [record.label for record in found.records]
    embedded = None
    if text and all(captions):
        embedded = embed_texts(model, captions, batch_size=batch_size, features=features, dtype=dtype)
    return Embeddings(
        image=found.features["image"],
        text=embedded,
        labels=None if None in labels else [str(label) for label in labels],
        keys=[record.key for record in found.records],
        captions=captions if any(captions) else None,
        failures=found.failures,
    )


def embed_texts(
    model: Model,
    texts: Sequence[str],
    *,
    batch_size: int = 256,
    features: str = "projected",
    dtype: torch.dtype | None = None,
) -> NDArray[np.float32]:
    """Embeddings of texts, float32 (len(texts), D): normalised, or with "tower" the features before the projection.

    Each distinct text is encoded once. Texts of like length share a batch, since a batch is as wide as its
    longest.
    """
    # Most words first: if memory is too small, it shows at once.
    distinct = sorted(set(texts), key=lambda text: (len(text.split()), len(text), text), reverse=True)
    row = {text: index for index, text in enumerate(distinct)}
    encode = model.encode_text if features == "projected" else model.text_features
    blocks = []
    with inference(model, dtype):
        for start in range(0, len(distinct), batch_size):
            tokens = model.tokenize(distinct[start : start + batch_size]).to(model.device)
            blocks.append(encode(tokens).float().cpu().numpy())
    encoded: NDArray[np.float32] = np.concatenate(blocks)
    return encoded[[row[text] for text in texts]]


def extract(
    model: Model,
    source: Images,
    functions: dict[str, Callable[[list[Image.Image]], NDArray[Any]]],
    *,
    batch_size: int = 256,
    workers: int = 0,
    invert: bool = False,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Extracted:
    """One pass over a source: each function sees each batch of RGB images and returns one row an image.

    Raises `UserError` when no image can be read.
    """
    records = open_images(source)
    total = len(records)  # type: ignore[arg-type]
    rows: dict[str, list[NDArray[Any]]] = {name: [] for name in functions}
    kept: list[Record] = []
    failures: dict[str, str] = {}
    done = 0
    for batch in _decoded(records, batch_size, workers):
        done += len(batch)
        images = []
        for record, image in batch:
            if isinstance(image, Rejected):
                failures[record.key] = image.reason
                continue
            images.append(ImageOps.invert(image) if invert else image)
            kept.append(Record(record.key, None, record.captions, record.label))
        if images:
            with inference(model, dtype):
                for name, function in functions.items():
                    rows[name].append(function(images))
        if progress is not None:
            progress(done, total)
    if not kept:
        shown = ", ".join(f"{key}: {reason}" for key, reason in list(failures.items())[:3])
        reasons = f"none of the {total} images can be read ({shown})" if failures else "there is no image"
        raise UserError(f"{_name(source)}: {reasons}")
    return Extracted({name: np.concatenate(blocks) for name, blocks in rows.items()}, kept, failures)


def on_pixels(model: Model, encode: Callable[[Tensor], Tensor]) -> Callable[[list[Image.Image]], NDArray[np.float32]]:
    """`encode` as a function of images: preprocessed as `model` does, on its device, float32 rows back."""

    def rows(images: list[Image.Image]) -> NDArray[np.float32]:
        pixels = torch.stack([model.preprocess(image) for image in images]).to(model.device)
        array: NDArray[np.float32] = encode(pixels).float().cpu().numpy()
        return array

    return rows


def open_images(source: Images) -> Iterable[Record]:
    """A source as records with a length; a list of PIL images and paths is one, in its own order."""
    if isinstance(source, Source):
        return source
    if isinstance(source, ShardIndex):
        return _IndexRecords(source)
    if isinstance(source, (str, PathLike)):
        return open_source(source)
    if not len(source):
        raise UserError("images: the list is empty")
    for item in source:
        if not isinstance(item, (str, PathLike, Image.Image, Record)):
            raise UserError(f"images: a list of PIL images or paths is needed, it holds a {type(item).__name__}")
    return list(source)  # decoded item by item: see `_decode`


class _IndexRecords:
    """The samples of a shard index, in order."""

    def __init__(self, index: ShardIndex) -> None:
        self.index = index

    def __len__(self) -> int:
        return len(self.index)

    def __iter__(self) -> Iterator[Record]:
        return (self.index.record(i) for i in range(len(self.index)))


def _decoded(
    records: Iterable[Any], batch_size: int, workers: int
) -> Iterator[list[tuple[Record, Image.Image | Rejected]]]:
    """Batches of decoded images, in order; with workers, the next batch is decoded while this one is used."""
    items = iter(enumerate(records))
    pool = ThreadPoolExecutor(workers) if workers else None
    with pool or nullcontext():
        run = pool.map if pool else map
        ahead = run(_decode, list(islice(items, batch_size)))
        while batch := list(ahead):
            ahead = run(_decode, list(islice(items, batch_size)))
            yield batch


def _decode(numbered: tuple[int, Any]) -> tuple[Record, Image.Image | Rejected]:
    number, item = numbered
    if isinstance(item, Image.Image):
        return Record(f"image {number}", None), to_rgb(item)
    if not isinstance(item, Record):
        try:
            item = Record(str(item), Path(item).read_bytes())
        except OSError as error:
            return Record(str(item), None), Rejected((error.strerror or str(error)).lower())
    if item.image is None:
        return item, Rejected("no such image")
    try:
        return item, decode_image(item.image)
    except Rejected as rejected:
        return item, rejected


def _name(source: Images) -> str:
    return str(source) if isinstance(source, (str, PathLike)) else "images"

"""From images and captions to rows of numbers: one pass over a source, whatever it is.

Legend: N images that could be read, D dimensions, H = W = the model's image size.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from contrastive.errors import UserError
from contrastive.evaluation.duplicates import difference_hashes
from contrastive.evaluation.items import Images, Outcome, check_readable, class_label, decoded_batches, open_images
from contrastive.evaluation.protocol import Model, inference
from contrastive.printable import printable
from contrastive.shards import Record, Rejected

Progress = Callable[[int, int], None]  # images done, images in all
Functions = Mapping[str, Callable[[list[Image.Image]], Any]]


@dataclass(frozen=True)
class Embeddings:
    """Rows of the images that could be read, in the order of the source.

    image: float32 (N, D), one row an image.  text: float32 (T, D), one row a caption: of each image's first
    caption (T = N), or of all of them; None when not asked for, where an image has no first caption, or where no
    image has one.  image_of_text: int64 (T,), the row of each caption's image.
    keys, labels: lists of N; labels is None when some image has none.  captions: a list of T texts ("" where there is
    none), None when the source has none.  failures: key -> reason, of the images that were left out.
    image_tower (N, F), text_tower (T, E): the features before the projection, with features="both".
    looks: uint64 (N, 4), the perceptual hashes (see `duplicates`), with features="both".  content: a hash of what was
    read: keys, labels, captions and the bytes of every image.
    outcomes: of every item of the source, in its order.  unlabelled: keys of the rows without a label.
    """

    image: NDArray[np.float32]
    text: NDArray[np.float32] | None
    labels: list[str] | None
    keys: list[str]
    captions: list[str] | None
    failures: dict[str, str]
    image_of_text: NDArray[np.int64] | None = None
    image_tower: NDArray[np.float32] | None = None
    text_tower: NDArray[np.float32] | None = None
    looks: NDArray[np.uint64] | None = None
    content: str = ""
    outcomes: list[Outcome] = field(default_factory=list)
    unlabelled: list[str] = field(default_factory=list)

    @property
    def rejected(self) -> dict[str, int]:
        """How many images were left out, by reason."""
        return dict(Counter(self.failures.values()))


@dataclass(frozen=True)
class Extracted:
    """What `extract` found: features by name, the records (without image bytes), and a hash of what was read.

    outcomes: see `Embeddings`.
    """

    features: dict[str, NDArray[Any]]
    records: list[Record]
    failures: dict[str, str]
    outcomes: list[Outcome]
    content: str


def embed(
    model: Model | str | PathLike[str],
    source: Images,
    *,
    batch_size: int = 256,
    features: str = "projected",
    workers: int = 0,
    text: bool | str = True,
    invert: bool = False,
    dtype: torch.dtype | None = None,
    cache: str | PathLike[str] | None = None,
    max_unreadable: float = 1.0,
    progress: Progress | None = None,
) -> Embeddings:
    """Embed the images of a source, and their captions.

    Args:
        model: or where it is, as `contrastive.load` takes it.
        source: anything that `contrastive.shards.open_source` takes, a `Source`, a `ShardIndex`, or a list of
            PIL images and paths.
        features: "projected" (normalised, comparable with texts), "tower" (before the projection, for
            probes, of the text tower too), or "both" from one pass: projected, and beside them
            `image_tower`, `text_tower` and `looks`.
        workers: threads that decode ahead; 0 decodes in between.
        text: True or "first" embeds first captions, if every image has one; "all" embeds every caption; False none.
        invert: turn the images into their negatives first (a white drawing on black becomes black on white).
        dtype: see `inference`.
        cache: a folder that keeps the rows, memory-mapped when they are read again; several sets and models may
            share it (see `contrastive.evaluation.stored`). All ranks of a process group must call this
            alike; each then does its slice.
        max_unreadable: the share of images that may be unreadable.

    Raises:
        UserError: the source is wrong or empty, none of its images can be read, or more than `max_unreadable`.
    """
    if isinstance(model, str | PathLike):
        from contrastive.models import load

        model = load(str(model))
    if features not in ("projected", "tower", "both"):
        raise UserError(f"features: '{features}' is unknown; use projected, tower or both")
    if cache is not None:
        from contrastive.evaluation.stored import embed_stored  # which imports this file

        found = embed_stored(
            model,
            source,
            cache,
            features=features,
            text=text,
            batch_size=batch_size,
            workers=workers,
            invert=invert,
            dtype=dtype,
            progress=progress,
        )
        check_readable(source, found.outcomes, max_unreadable)
        return found
    seen = extract(
        model,
        source,
        {"image": on_images(model, features)},
        batch_size=batch_size,
        workers=workers,
        invert=invert,
        dtype=dtype,
        progress=progress,
    )
    check_readable(source, seen.outcomes, max_unreadable)
    texts, owners = caption_rows(seen.records, text)
    rows_of_text: dict[str, NDArray[np.float32]] = {}
    if texts:
        rows_of_text = encode_texts(model, texts, batch_size=batch_size, features=features, dtype=dtype)
    return assemble(
        seen.records, seen.failures, seen.features, rows_of_text, texts, owners, seen.content, seen.outcomes
    )


def caption_rows(records: Sequence[Record], text: bool | str) -> tuple[list[str], NDArray[np.int64]]:
    """The captions to embed and the row of each one's image; none where first captions are missing."""
    if text not in (True, False, "first", "all"):
        raise UserError(f"text: '{text}' is unknown; use first, all or False")
    if text == "all":
        pairs = [(caption, row) for row, record in enumerate(records) for caption in record.captions]
        return [caption for caption, _ in pairs], np.array([row for _, row in pairs], dtype=np.int64)
    firsts = [record.captions[0] if record.captions else "" for record in records]
    return (firsts if text and all(firsts) else []), np.arange(len(firsts), dtype=np.int64)


def assemble(
    records: Sequence[Record],
    failures: dict[str, str],
    of_image: dict[str, NDArray[Any]],
    of_text: dict[str, NDArray[Any]],
    texts: list[str],
    owners_T: NDArray[np.int64],
    content: str,
    outcomes: list[Outcome],
) -> Embeddings:
    """`Embeddings` of the records that could be read, from their rows by kind ("image", "image_tower", …)."""
    labels = [record.label for record in records]
    captions = texts or [record.captions[0] if record.captions else "" for record in records]
    return Embeddings(
        image=of_image["image"],
        text=of_text.get("text"),
        labels=None if None in labels else [str(label) for label in labels],
        keys=[record.key for record in records],
        captions=captions if any(captions) else None,
        failures=failures,
        image_of_text=owners_T if texts else None,
        image_tower=of_image.get("image_tower"),
        text_tower=of_text.get("text_tower"),
        looks=of_image.get("looks"),
        content=content,
        outcomes=outcomes,
        unlabelled=[record.key for record in records if record.label is None],
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
    return encode_texts(model, texts, batch_size=batch_size, features=features, dtype=dtype)["text"]


def encode_texts(
    model: Model, texts: Sequence[str], *, batch_size: int, features: str, dtype: torch.dtype | None
) -> dict[str, NDArray[np.float32]]:
    """As `embed_texts`, by name: "text", and with features="both" also "text_tower", from one pass."""
    # Most words first: if memory is too small, it shows at once.
    distinct = sorted(set(texts), key=lambda text: (len(text.split()), len(text), text), reverse=True)
    row = {text: index for index, text in enumerate(distinct)}
    blocks: dict[str, list[NDArray[np.float32]]] = {}
    with inference(model, dtype):
        for start in range(0, len(distinct), batch_size):
            tokens = model.tokenize(distinct[start : start + batch_size]).to(model.device)
            encoded = _encode("text", features, tokens, model.text_features, model.encode_text)
            for name, values in encoded.items():
                blocks.setdefault(name, []).append(values)
    order = np.array([row[text] for text in texts])
    return {name: np.concatenate(parts)[order] for name, parts in blocks.items()}


def extract(
    model: Model,
    source: Images,
    functions: Functions,
    *,
    batch_size: int = 256,
    workers: int = 0,
    invert: bool = False,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Extracted:
    """One pass over a source: each function sees each batch of RGB images and returns one row an image.

    A function may return several kinds of rows, by name. Raises `UserError` when no image can be read.
    """
    records = open_images(source)
    total = len(records)  # type: ignore[arg-type]
    found = extract_items(model, records, functions, batch_size, workers, invert, dtype, progress, total)
    check_readable(source, found.outcomes, 1.0)
    return found


def extract_items(
    model: Model,
    records: Iterable[Any],
    functions: Functions,
    batch_size: int,
    workers: int,
    invert: bool,
    dtype: torch.dtype | None,
    progress: Progress | None,
    total: int,
) -> Extracted:
    """`extract` over items as `read_item` takes or gives them; it may be that none can be read."""
    rows: dict[str, list[NDArray[Any]]] = {}
    kept: list[Record] = []
    failures: dict[str, str] = {}
    outcomes: list[Outcome] = []
    digest = hashlib.blake2b(digest_size=16)
    done = 0
    for batch in decoded_batches(records, batch_size, workers):
        done += len(batch)
        images = []
        for record, image, content in batch:
            digest.update(content)
            key, name = printable(record.key), printable(record.name or record.key)
            if isinstance(image, Rejected):
                detail = image.detail or record.detail
                outcomes.append(Outcome(key, image.reason, detail and printable(detail), name))
                failures[key] = image.reason
                continue
            outcomes.append(Outcome(key, name=name))
            images.append(ImageOps.invert(image) if invert else image)
            kept.append(Record(key, None, record.captions, class_label(record.label)))
        if images:
            with inference(model, dtype):
                for name, function in functions.items():
                    made = function(images)
                    for kind, block in (made if isinstance(made, dict) else {name: made}).items():
                        rows.setdefault(kind, []).append(block)
        if progress is not None:
            progress(done, total)
    features = {name: np.concatenate(blocks) for name, blocks in rows.items()}
    return Extracted(features, kept, failures, outcomes, digest.hexdigest())


def on_images(model: Model, features: str) -> Callable[[list[Image.Image]], dict[str, NDArray[Any]]]:
    """The rows of images by kind: "image" and, with features="both", "image_tower" and "looks"."""

    def rows(images: list[Image.Image]) -> dict[str, NDArray[Any]]:
        pixels = torch.stack([model.preprocess(image) for image in images]).to(model.device)
        found: dict[str, NDArray[Any]] = _encode("image", features, pixels, model.image_features, model.encode_image)
        if features == "both":
            found["looks"] = difference_hashes(images)
        return found

    return rows


def _encode(
    name: str, features: str, inputs: Tensor, tower: Callable[[Tensor], Tensor], encode: Callable[[Tensor], Tensor]
) -> dict[str, NDArray[Any]]:
    """Rows under `name`, and for "both" the tower's own under `name`_tower: the trunk runs once."""
    if features == "both":
        before = tower(inputs)
        made = {name: encode(before), f"{name}_tower": before}
    else:
        made = {name: (encode if features == "projected" else tower)(inputs)}
    return {kind: rows.float().cpu().numpy() for kind, rows in made.items()}


def on_pixels(model: Model, encode: Callable[[Tensor], Tensor]) -> Callable[[list[Image.Image]], NDArray[np.float32]]:
    """`encode` as a function of images: preprocessed as `model` does, on its device, float32 rows back."""

    def rows(images: list[Image.Image]) -> NDArray[np.float32]:
        pixels = torch.stack([model.preprocess(image) for image in images]).to(model.device)
        array: NDArray[np.float32] = encode(pixels).float().cpu().numpy()
        return array

    return rows

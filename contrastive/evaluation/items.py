"""The items of a source, whatever it is, as records with decoded images; and the outcome of each item."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageOps

from contrastive.errors import UserError
from contrastive.evaluation.label_arrays import is_missing
from contrastive.printable import printable
from contrastive.shards import Record, Rejected, ShardIndex, Source, decode_image, open_source
from contrastive.shards.decode import decoded
from contrastive.shards.shard_source import ShardSource
from contrastive.wording import a_type

Images = str | PathLike[str] | Source | ShardIndex | Sequence[Any]


class Outcome(NamedTuple):
    """The result of reading one item of a source.

    reason: why it was left out, to be counted; None for one that has a row.
    detail: the value that the reason is about, such as a path or a size.
    name: for messages: the key, or file and line for a row that is only numbered.
    """

    key: str
    reason: str | None = None
    detail: str | None = None
    name: str = ""

    @property
    def fault(self) -> str:
        """The reason with its detail; "" where there is none."""
        return f"{self.reason} ({self.detail})" if self.reason and self.detail else self.reason or ""


def check_readable(source: Images, outcomes: Sequence[Outcome], limit: float) -> None:
    """Raises `UserError`, with the commonest reasons and a few keys, when too large a share could not be read."""
    total, failures = len(outcomes), [one for one in outcomes if one.reason is not None]
    if len(failures) == total:
        shown = ", ".join(f"{one.name}: {one.fault}" for one in failures[:3])
        reasons = f"none of the {total} images can be read ({shown})" if failures else "there is no image"
        raise UserError(f"{_name(source)}: {reasons}")
    if len(failures) > limit * total:
        counts = Counter(one.reason for one in failures)
        reasons = ", ".join(f"{count} × {reason}" for reason, count in counts.most_common(3))
        raise UserError(
            f"{_name(source)}: {len(failures)} of {total} images cannot be read ({reasons}; first "
            f"{failures[0].name}), the limit is {limit:.1%}; repair them or raise the limit"
        )


def class_label(label: Any) -> str | None:
    """A label of a source as text without outer white space; None for a missing one."""
    return None if is_missing(label) else printable(str(label).strip())


def open_images(source: Images) -> Iterable[Record]:
    """A source as records with a length; a list of PIL images and paths is one, in its own order."""
    if isinstance(source, Source):
        return source
    if isinstance(source, ShardIndex):
        return ShardSource(source)
    if isinstance(source, (str, PathLike)):
        return open_source(source)
    if not len(source):
        raise UserError("images: the list is empty")
    for item in source:
        if not isinstance(item, (str, PathLike, Image.Image, Record)):
            raise UserError(f"images: a list of PIL images or paths is needed, it holds {a_type(item)}")
    return list(source)  # decoded item by item: see `_decode`


def decoded_batches(
    records: Iterable[Any], batch_size: int, workers: int
) -> Iterator[list[tuple[Record, Image.Image | Rejected, bytes]]]:
    """Batches of decoded images, in order; with workers, the next batch is decoded while this one is used."""
    items = iter(enumerate(records))
    pool = ThreadPoolExecutor(workers) if workers else None
    with pool or nullcontext():
        run = pool.map if pool else map
        ahead = run(_decode, list(islice(items, batch_size)))
        while batch := list(ahead):
            ahead = run(_decode, list(islice(items, batch_size)))
            yield batch


def _decode(numbered: tuple[int, Any]) -> tuple[Record, Image.Image | Rejected, bytes]:
    number, item = numbered
    record, image = item if isinstance(item, tuple) else read_item(number, item)
    content = content_hash(record, image)
    if image is not None:
        return record, image, content
    if record.image is None:
        return record, Rejected("no such image"), content
    try:
        return record, decode_image(record.image), content
    except Rejected as rejected:
        return record, rejected, content


def read_item(number: int, item: Any) -> tuple[Record, Image.Image | Rejected | None]:
    """One item of a source as a record with its bytes, and the picture or a fault where no bytes need decoding."""
    if isinstance(item, Record):
        return item, None if item.image_fault is None else Rejected(item.image_fault, item.detail)
    if isinstance(item, Image.Image):
        record = Record(f"image {number}", None)
        try:
            return record, decoded(item)
        except Rejected as rejected:
            return record, rejected
    try:
        return Record(str(item), Path(item).read_bytes()), None
    except OSError as error:
        return Record(str(item), None), Rejected((error.strerror or str(error)).lower())


def decoded_images(source: Images, *, invert: bool = False, workers: int = 0) -> Iterator[Image.Image]:
    """The images of a source that can be read, in its order: those, and as, `embed` sees them."""
    for batch in decoded_batches(open_images(source), 256, workers):
        for _, image, _ in batch:
            if not isinstance(image, Rejected):
                yield ImageOps.invert(image) if invert else image


def content_hash(record: Record, image: Image.Image | Rejected | None) -> bytes:
    """16 bytes that change with the key, the label, a caption, or a byte of the image."""
    digest = hashlib.blake2b(repr((record.key, record.label, record.captions)).encode(), digest_size=16)
    if isinstance(image, Image.Image):
        digest.update(f"{image.mode} {image.size}".encode() + image.tobytes())
    elif record.image is not None:
        digest.update(record.image)
    return digest.digest()


def _name(source: Images) -> str:
    return str(source) if isinstance(source, (str, PathLike)) else "images"

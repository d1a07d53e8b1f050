"""One image-text pair, a stream of them, and what can be told about its bytes without decoding them."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Record:
    """One thing read from a source, before or after sharding.

    key: name, unique in its source; "/" separates folders.
    image: the encoded bytes, untouched; None where the source names an image that is not there.
    captions: the first is *the* caption, the others are variants; empty where there is none.
    label: class name, where the source is labelled.
    meta: further scalar columns (source, license, …).
    """

    key: str
    image: bytes | None
    captions: tuple[str, ...] = ()
    label: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)


class Rejected(Exception):
    """One sample cannot be used; `reason` is the same text for the same fault, to be counted."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Source:
    """A re-iterable stream of records with a length.

    kind: "parquet", "csv", "jsonl", "images" or "shards". columns: names of a table's columns; else empty.
    """

    kind: str
    columns: list[str]
    limit: int | None = None

    def __iter__(self) -> Iterator[Record]:
        return itertools.islice(self._records(), self.limit)

    def __len__(self) -> int:
        return self._count() if self.limit is None else min(self.limit, self._count())

    def __str__(self) -> str:
        return f"{self.kind} of {len(self):,} records"

    def _records(self) -> Iterator[Record]:
        raise NotImplementedError

    def _count(self) -> int:
        raise NotImplementedError


# File name extensions of the formats that are read, as a folder or a tar may spell them.
IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"})


def image_extension(data: bytes) -> str | None:
    """The format's usual extension (without a dot), told from the first bytes; None for anything else."""
    if data[:3] == b"\xff\xd8\xff":
        return "jpg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "gif"
    if data[:4] in (b"II*\0", b"MM\0*"):
        return "tiff"
    if data[:2] == b"BM" and data[6:10] == b"\0\0\0\0":  # the reserved words: "BM" alone is weak evidence
        return "bmp"
    return None

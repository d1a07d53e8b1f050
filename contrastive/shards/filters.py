"""Which pairs are kept, and how their images are re-encoded, when shards are made."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from PIL import Image

from contrastive.errors import UserError
from contrastive.shards.decode import image_size, is_upright
from contrastive.shards.index import caption_id
from contrastive.shards.record import Record, Rejected, image_extension
from contrastive.shards.skipped import Skip

ENCODINGS = {"webp": "webp", "jpeg": "jpg", "png": "png"}
# The format of re-encoded images without --format; PNG for all others. Photographs would be many times larger as PNG.
_OWN = {"webp": "webp", "jpg": "jpg", "heic": "jpg", "avif": "jpg", "jp2": "jpg", "j2k": "jpg"}


class Scorer(Protocol):
    """Scores pairs by how well image and caption fit. It travels to other processes by pickle."""

    minimum: float

    def identity(self) -> Any:
        """What must be equal (as JSON) for two scorers to give the same scores."""

    def prepare(self, image: Image.Image) -> Any:
        """What is kept of an RGB image until it is scored."""

    def score(self, images: Sequence[Any], captions: Sequence[str]) -> Sequence[float]:
        """One score a pair; a pair below `minimum` is left out."""


@dataclass(frozen=True)
class Filters:
    """Limits on the pairs that are kept; None for no limit.

    min_size: pixels of the shorter side, as the source stores it. max_aspect: longer side over shorter side.
    min_caption, max_caption: characters of the first caption (words would mean nothing in scripts without
    spaces). deduplicate: "caption" (equal apart from case and white space), "image" (equal bytes) or "both"
    (either repeats); the first in source order is kept.
    """

    min_size: int | None = None
    max_aspect: float | None = None
    min_caption: int | None = None
    max_caption: int | None = None
    deduplicate: str | None = None

    def __post_init__(self) -> None:
        for name in ("min_size", "max_aspect", "min_caption", "max_caption"):
            value = getattr(self, name)
            if value is not None and not 1 <= value < float("inf"):
                raise UserError(f"--{name.replace('_', '-')} {value}: give at least 1")
        if self.min_caption and self.max_caption and self.min_caption > self.max_caption:
            raise UserError(f"--min-caption {self.min_caption}: is above --max-caption {self.max_caption}")
        if self.deduplicate not in (None, "caption", "image", "both"):
            raise UserError(f"--deduplicate {self.deduplicate}: give caption, image or both")

    def skip(self, record: Record) -> Skip | None:
        """The reason why a pair is left out, by its text and its image's header; None where it is kept."""
        length = len(record.captions[0])
        if self.min_caption is not None and length < self.min_caption:
            return Skip("caption too short", f"{length:,} characters")
        if self.max_caption is not None and length > self.max_caption:
            return Skip("caption too long", f"{length:,} characters")
        if self.min_size is None and self.max_aspect is None:
            return None
        assert record.image is not None
        try:
            width, height = image_size(record.image)
        except Rejected as rejected:
            return Skip(rejected.reason, rejected.detail)
        short, long = sorted((width, height))
        if self.min_size is not None and short < self.min_size:
            return Skip("image too small", f"{width} x {height}")
        if self.max_aspect is not None and long > self.max_aspect * short:
            return Skip("image too elongated", f"{width} x {height}")
        return None


def image_id(data: bytes) -> int:
    """A 64-bit signed hash of an image's bytes."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


def pair_ids(record: Record) -> tuple[int, int]:
    """What tells pairs apart: the hashes of the image and of the first caption."""
    assert record.image is not None
    return image_id(record.image), caption_id(record.captions[0])


DUPLICATES = (None, "duplicate image", "duplicate caption")


def repeated(ids: np.ndarray, deduplicate: str) -> np.ndarray:
    """Which rows repeat an earlier one: uint8 (n,), numbers of DUPLICATES.

    ids: int64 (n, 2), image and caption. A row that is left out for its image hides no later caption.
    """
    found = np.zeros(len(ids), np.uint8)
    for number, name in ((1, "image"), (2, "caption")):
        if deduplicate in (name, "both"):
            kept = np.flatnonzero(found == 0)
            first = np.unique(ids[kept, number - 1], return_index=True)[1]
            again = np.ones(len(kept), bool)
            again[first] = False
            found[kept[again]] = number
    return found


@dataclass(frozen=True)
class Transform:
    """Changes to images. Bytes stay untouched where an image has the wanted size and format and is upright.

    resize: pixels of the `mode` side ("shorter" or "longer"); smaller images are not enlarged.
    format: "webp", "jpeg" or "png"; None keeps the image's own (PNG for GIF, BMP, TIFF and Netpbm, JPEG for HEIC, AVIF
    and JPEG 2000). quality: of WebP and JPEG, 1 to 100.
    """

    resize: int | None = None
    mode: str = "shorter"
    format: str | None = None
    quality: int = 90

    def __post_init__(self) -> None:
        if self.resize is not None and self.resize < 1:
            raise UserError(f"--resize {self.resize}: give at least 1")
        if self.mode not in ("shorter", "longer"):
            raise UserError(f"--resize-mode {self.mode}: give shorter or longer")
        if self.format not in (None, *ENCODINGS):
            raise UserError(f"--format {self.format}: give webp, jpeg or png")
        if not 1 <= self.quality <= 100:
            raise UserError(f"--quality {self.quality}: give 1 to 100")

    def __bool__(self) -> bool:
        return self.resize is not None or self.format is not None

    def apply(self, record: Record, image: Image.Image) -> Record:
        """The record with its image re-encoded where that is needed, without metadata. image: of `decode_image`."""
        assert record.image is not None
        stored = image_size(record.image)
        size = self._size(stored)
        own = image_extension(record.image)
        wanted = ENCODINGS[self.format] if self.format else _OWN.get(own or "", "png")
        if size == stored and wanted == own and is_upright(record.image):
            return record
        if size[0] > image.width:  # a large JPEG, which comes reduced: it is not enlarged again
            size = image.size
        if size != image.size:
            image = image.resize(size, Image.Resampling.BICUBIC)
        if wanted == "jpg" and max(size) > 65_500 or wanted == "webp" and max(size) > 16_383:
            raise Rejected("image too large")
        buffer = io.BytesIO()
        options = {} if wanted == "png" else {"quality": self.quality}
        image.save(buffer, "JPEG" if wanted == "jpg" else wanted.upper(), **options)
        return replace(record, image=buffer.getvalue())

    def _size(self, size: tuple[int, int]) -> tuple[int, int]:
        side = min(size) if self.mode == "shorter" else max(size)
        if self.resize is None or side <= self.resize:
            return size
        width, height = (max(1, round(edge * self.resize / side)) for edge in size)
        return width, height

"""One image-text pair, a stream of them, and what can be told about its bytes without decoding them."""

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Record:
    """One thing read from a source, before or after sharding.

    key: name, unique in its source; "/" separates folders.
    image: the encoded bytes, untouched; None where the source names an image that is not there.
    captions: the first is *the* caption, the others are variants; empty where there is none.
    label: class name, where the source is labelled.
    meta: further scalar columns (source, license, …).
    fault: why the source could not give this row, to be counted; None for all others.
    detail: the value that the fault is about, such as the path that was looked for; None without a fault.
    place: the file and the line (text) or row (Parquet, Arrow) that the record was read from; None where not known.
    name: what to call the record where its key is a bare number: the path in its row, or its place; else None.
    """

    key: str
    image: bytes | None
    captions: tuple[str, ...] = ()
    label: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    fault: str | None = None
    detail: str | None = None
    place: str | None = None
    name: str | None = field(default=None, compare=False)

    @property
    def image_fault(self) -> str | None:
        """The fault; None for a fault of the caption (its text begins with this word): the image can be used."""
        of_caption = self.image is not None and self.fault is not None and self.fault.startswith("caption")
        return None if of_caption else self.fault


class SkippedRow(NamedTuple):
    """A line of rejected.jsonl: something that did not become a pair. See `Record` for detail and place."""

    key: str
    reason: str
    detail: str | None = None
    place: str | None = None


class Rejected(Exception):
    """One sample cannot be used.

    reason: the same text for the same fault, to be counted.
    detail: what is the matter with this one, such as its size; None where the reason says it all.
    """

    def __init__(self, reason: str, detail: str | None = None) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return self.reason if self.detail is None else f"{self.reason} ({self.detail})"


@dataclass(frozen=True)
class Segment:
    """Consecutive rows of one file: the first lies `at` (a row number; for lines of text, a byte offset).

    line: for lines of text, the number of the line there, from 1.
    """

    file: int
    at: int
    rows: int
    line: int = 1


@dataclass(frozen=True)
class Part:
    """The rows that become shard `number`; `row` is the number of the first one in the whole source.

    roles: a byte a row where rows are grouped by image, else empty: OWN, a record of its own; BEFORE, a caption of the
    record before; APART, a caption of an earlier record that is not directly before.
    more: for a row of this part, captions and labels of the rows that are APART from it.
    """

    number: int
    row: int
    segments: tuple[Segment, ...]
    roles: bytes = b""
    more: Mapping[int, tuple[tuple[str, ...], tuple[str, ...]]] = field(default_factory=dict)

    @property
    def records(self) -> int:
        """The number of records, which is less than the number of rows where rows are grouped."""
        return self.roles.count(OWN) if self.roles else sum(segment.rows for segment in self.segments)


OWN, BEFORE, APART = range(3)  # of Part.roles


class Source:
    """A re-iterable stream of records with a length, which can also be read in parts.

    kind: "parquet", "csv", "jsonl", "datasets", "images" or "shards". columns: names of a table's columns;
    else empty. files: what it is read from. rejected: counts of what it holds that is no row, by reason.
    notes: one-line remarks on how it is read, for every command to print. grouped: rows that became a caption of
    an earlier row with the same image.
    """

    kind: str
    columns: list[str]
    files: list[Path]
    limit: int | None = None
    name: str = ""  # the path that was opened, and the split
    left_out: Mapping[str, int] = MappingProxyType({})  # the value of `rejected`, unless a class adds to it

    def __iter__(self) -> Iterator[Record]:
        return itertools.islice(self._records(), self.limit)

    def __len__(self) -> int:
        return self._count() if self.limit is None else min(self.limit, self._count())

    def __str__(self) -> str:
        return self.name or f"{self.kind} of {len(self):,} records"

    @property
    def rejected(self) -> Mapping[str, int]:
        return self.left_out

    def rejections(self) -> Iterator["SkippedRow"]:
        """The rows that `rejected` counts, one by one, where the source knows them."""
        return iter(())

    @property
    def grouped(self) -> int:
        return 0

    @property
    def notes(self) -> list[str]:
        return []

    @property
    def caption_notes(self) -> list[str]:
        """Those of `notes` that concern captions alone."""
        return []

    def cut(self, size: int) -> list[Part]:
        """The source as parts of `size` rows (the last may be shorter), the same at every call."""
        every = ((file, at) for file, starts in enumerate(self._row_starts()) for at in starts)
        rows = itertools.islice(every, self.limit)
        parts: list[Part] = []
        while chunk := list(itertools.islice(rows, size)):
            groups = [list(group) for _, group in itertools.groupby(chunk, key=lambda row: row[0])]
            segments = tuple(Segment(*group[0], len(group)) for group in groups)
            parts.append(Part(len(parts), len(parts) * size, segments))
        return parts

    def read(self, part: Part) -> Iterator[Record]:
        """The records of one part; those of all parts, in order, are those of the source."""
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """What must be equal (as JSON) for two openings to give the same records."""
        stats = [(file, file.stat()) for file in self.files]
        files = [[os.path.abspath(file), stat.st_size, stat.st_mtime_ns] for file, stat in stats]
        return {"kind": self.kind, "files": files, "limit": self.limit}

    def _row_starts(self) -> Iterator[Iterable[int]]:
        """For every file, where each of its rows lies, as in `Segment`."""
        raise NotImplementedError

    def _records(self) -> Iterator[Record]:
        raise NotImplementedError

    def _count(self) -> int:
        raise NotImplementedError


class NumberedSource(Source):
    """A source whose records are found by their number, such as the items of a list."""

    def _record(self, i: int) -> Record:
        raise NotImplementedError

    def read(self, part: Part) -> Iterator[Record]:
        for segment in part.segments:
            yield from map(self._record, range(segment.at, segment.at + segment.rows))

    def _records(self) -> Iterator[Record]:
        return map(self._record, range(self._count()))

    def _row_starts(self) -> Iterator[Iterable[int]]:
        yield range(self._count())


MAX_IMAGE_BYTES = 32 << 20  # of one encoded image
MAX_CAPTION_BYTES = 64 << 10  # of the caption: ten pages
MAX_TEXT_BYTES = 1 << 20  # of all captions of one pair
MAX_JSON_BYTES = 2 << 20  # of a pair's .json: all captions, with room for marks and other columns

# File name extensions of pictures, as a folder or a tar may spell them. The bytes of a file decide its format.
IMAGE_EXTENSIONS = frozenset(
    "jpg jpeg jpe jfif jfi jif pjpeg pjp png apng webp gif bmp dib tif tiff avif avifs heic heics heif heifs hif jxl "
    "jp2 j2k j2c jpc jpf jpx ppm pgm pbm pnm pfm".split()
)
FIRST_BYTES = 64  # that `image_extension` takes

_HEIF = frozenset((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1", b"mif2"))


def image_extension(data: bytes | memoryview) -> str | None:
    """The format's usual extension (without a dot), by the first bytes; None for anything else.

    data: FIRST_BYTES of the file at least, or all of it.
    """
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
    if data[4:8] == b"ftyp":
        return _of_brands(bytes(data[:FIRST_BYTES]))
    if data[:2] == b"\xff\x0a" or data[:12] == b"\0\0\0\x0cJXL \r\n\x87\n":
        return "jxl"
    if data[:12] == b"\0\0\0\x0cjP  \r\n\x87\n":
        return "jp2"
    if data[:4] == b"\xff\x4f\xff\x51":
        return "j2k"
    return _netpbm(bytes(data[:4]))


def _of_brands(head: bytes) -> str | None:
    """AVIF or HEIF of an ISO media file, which may be a film as well: its major brand, then the compatible ones."""
    length = min(int.from_bytes(head[:4], "big"), len(head))
    brands = [head[8:12], *(head[at : at + 4] for at in range(16, length - 3, 4))]
    if brands[0] in (b"avif", b"avis"):
        return "avif"
    if brands[0] not in _HEIF:
        return None
    general = brands[0] in (b"mif1", b"msf1", b"mif2")  # which do not name the codec
    return "avif" if general and {b"avif", b"avis"} & set(brands) else "heic"


def _netpbm(head: bytes) -> str | None:
    if head[:1] != b"P" or head[2:3] not in (b" ", b"\t", b"\n", b"\r") or head[3:4] not in b"#0123456789":
        return None
    kind = head[1:2]
    return "pfm" if kind in b"fF" else "ppm" if kind in b"123456" else None

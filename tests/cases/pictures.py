"""The same picture in every format and orientation, and by every path through the product."""

import io
import struct
import zlib

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# How a camera that is held as `orientation` says stores an upright picture: numpy's own turns, not the product's.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}
# What a format loses, as a mean of grey levels. Another turn of a `scene` is some 80 away.
LOSS = {"JPEG": 4.0, "PNG": 0.0, "WEBP": 0.0, "TIFF": 0.0, "AVIF": 4.0, "HEIF": 4.0}
OPTIONS: dict[str, dict[str, object]] = {
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"lossless": True},
    "AVIF": {"quality": 95, "subsampling": "4:4:4"},
    "HEIF": {"quality": 95, "chroma": 444},
}


def scene(seed: int, width: int = 64, height: int = 48, channels: int = 3) -> NDArray[np.uint8]:
    """Blocks of 8 x 8 in random colours: no turn of it looks like another, and lossy formats keep it."""
    blocks = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, channels), np.uint8)
    return blocks.repeat(8, axis=0).repeat(8, axis=1)


def exif(orientation: int, order: str = "<") -> bytes:
    mark = b"II*\0" if order == "<" else b"MM\0*"
    entry = struct.pack(f"{order}HHIHH", 274, 3, 1, orientation, 0)
    return b"Exif\0\0" + mark + struct.pack(f"{order}IH", 8, 1) + entry + struct.pack(f"{order}I", 0)


def photo(upright: NDArray[np.uint8], format: str, orientation: int, order: str = "<", **options: object) -> bytes:
    """The bytes of a picture that was stored turned, with the tag that turns it back."""
    image = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    if format == "HEIF":
        import pillow_heif

        pillow_heif.register_heif_opener()  # it writes irot and imir in place of the tag
    buffer = io.BytesIO()
    image.save(buffer, format, exif=exif(orientation, order), **OPTIONS.get(format, {}) | options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, depth: int, color: int, row: bytes, before: bytes = b"", after: bytes = b"") -> bytes:
    """A PNG of one row, written by hand. color: the type of the header (0 grey, 2 RGB, 3 palette, 4 and 6 alpha)."""
    header = struct.pack(">IIBBBBB", width, 1, depth, color, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" + row))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before + pixels + after + chunk(b"IEND", b"")


def tiff(width: int, bits: int, row: bytes, order: str = "<", black: int = 1, kind: int = 1, **tags: int) -> bytes:
    """A grey TIFF of one row, written by hand. black: 1 where 0 is black, 0 where it is white. kind: of a sample, 1
    unsigned, 2 signed, 3 float."""
    entries = {256: width, 257: 1, 258: bits, 259: 1, 262: black, 277: 1, 278: 1, 339: kind, 279: len(row)}
    entries |= {int(tag[1:]): value for tag, value in tags.items()}
    entries[273] = 8 + 2 + 12 * (len(entries) + 1) + 4
    head = b"II*\0" if order == "<" else b"MM\0*"
    fields = b"".join(struct.pack(f"{order}HHIHH", tag, 3, 1, entries[tag], 0) for tag in sorted(entries))
    return head + struct.pack(f"{order}IH", 8, len(entries)) + fields + struct.pack(f"{order}I", 0) + row

"""The orientation of a picture: the tag of EXIF, and turning by it.

A camera stores the rows as its sensor gives them, with a number from 1 (as stored) to 8 that says how to turn them.
"""

import re

import numpy as np
from PIL import Image

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Formats whose EXIF says how to turn what Pillow decodes. Decoders of HEIF and JPEG XL turn by themselves, by what
# their container says, and leave the camera's tag in place.
_TAGGED = (None, "JPEG", "MPO", "PNG", "WEBP", "TIFF", "AVIF")
_BLOCKS = frozenset(("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"))  # of `Image.info`
_TAG = 274
_BYTES_OF_TYPE = {1: 1, 3: 2, 4: 4}  # BYTE, SHORT, LONG
_XMP = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
_XMP_MARK = b"http://ns.adobe.com/xap/1.0/\0"


def turn(image: Image.Image, orientation: int) -> Image.Image:
    """The image turned upright, without metadata; `image` itself where there is nothing to turn."""
    method = _TURNS.get(orientation)
    if method is None:
        return image
    turned = image.transpose(method)
    turned.info = {}
    return turned


def turn_pixels(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """`turn` for an array (height, width, channels): contiguous, or `pixels` itself where there is nothing to turn."""
    if orientation not in _TURNS:
        return pixels
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    rows = slice(None, None, -1 if orientation in (3, 4, 7, 8) else 1)
    columns = slice(None, None, -1 if orientation in (2, 3, 6, 7) else 1)
    return np.ascontiguousarray(pixels[rows, columns])


def turned_size(width: int, height: int, orientation: int) -> tuple[int, int]:
    """Width and height after turning."""
    return (height, width) if orientation >= 5 else (width, height)


def orientation_of(image: Image.Image) -> int:
    """The orientation, 1 to 8, of the pixels that Pillow gives; 1 where there is no tag that can be read.

    A PNG may hold its EXIF after its pixels, and Pillow turns a TIFF while it loads: load the image first.
    """
    if image.format == "TIFF":
        return _of_tiff(image)
    if _BLOCKS.isdisjoint(image.info) or image.format not in _TAGGED:
        return 1
    found = exif_orientation(_exif_block(image))
    packet = image.info.get("XML:com.adobe.xmp") or image.info.get("xmp")
    if found is None and packet and image.format != "AVIF":
        found = xmp_orientation(packet)
    return found if found in _TURNS else 1


def _of_tiff(image: Image.Image) -> int:
    try:
        found = image.getexif().get(_TAG, 1)
    except Exception:  # of many kinds, for a damaged directory
        return 1
    return found if isinstance(found, int) and found in _TURNS else 1


def _exif_block(image: Image.Image) -> bytes:
    block = image.info.get("exif")
    if isinstance(block, bytes):
        return block
    written = image.info.get("Raw profile type exif")  # by ImageMagick, into the texts of a PNG: lines of digits
    if not isinstance(written, str):
        return b""
    try:
        return bytes.fromhex("".join(written.split("\n")[3:]))
    except ValueError:
        return b""


def exif_orientation(block: bytes) -> int | None:
    """The value of the tag in an EXIF block, whatever it is; None where the block has none or is damaged."""
    while block.startswith(b"Exif\0\0"):
        block = block[6:]
    mark = block[:4]
    if mark == b"II*\0":
        order = "little"
    elif mark == b"MM\0*":
        order = "big"
    else:
        return None
    at = int.from_bytes(block[4:8], order)  # type: ignore[arg-type]
    wanted = _TAG.to_bytes(2, order)  # type: ignore[arg-type]
    for entry in range(at + 2, at + 2 + 12 * int.from_bytes(block[at : at + 2], order), 12):  # type: ignore[arg-type]
        if entry + 12 > len(block):
            return None
        if block[entry : entry + 2] == wanted:
            kind, count = (
                int.from_bytes(block[entry + 2 : entry + 4], order),  # type: ignore[arg-type]
                int.from_bytes(block[entry + 4 : entry + 8], order),  # type: ignore[arg-type]
            )
            width = _BYTES_OF_TYPE.get(kind)
            if width is None or count != 1:
                return None
            return int.from_bytes(block[entry + 8 : entry + 8 + width], order)  # type: ignore[arg-type]
    return None


def xmp_orientation(block: bytes | str) -> int | None:
    """As `exif_orientation`, of an XMP packet."""
    found = _XMP.search(block.encode("utf-8", "replace") if isinstance(block, str) else block)
    return int(found[1]) if found else None


def jpeg_orientation(data: bytes | memoryview) -> int:
    """The orientation, 1 to 8, read from the segments before a JPEG's pixels, without an image library."""
    at, exif, xmp = 2, b"", b""
    try:
        while (marker := data[at + 1] if data[at] == 0xFF else 0xFF) != 0xDA:
            if marker < 0xC0 or 0xD0 <= marker < 0xDA:  # no segment
                at += 2
                continue
            if marker == 0xFF:  # filling or stray bytes between segments, which libjpeg passes over
                at += 1
                continue
            if marker == 0xE1:
                body = bytes(data[at + 4 : at + 2 + (data[at + 2] << 8 | data[at + 3])])
                if body.startswith(b"Exif\0\0"):
                    exif += body[6:] if exif else body  # a block longer than a segment continues in the next
                elif not xmp and body.startswith(_XMP_MARK):
                    xmp = body
            at += 2 + (data[at + 2] << 8 | data[at + 3])
    except IndexError:  # cut off
        pass
    if not exif and not xmp:
        return 1
    found = exif_orientation(exif) if exif else None
    if found is None and xmp:
        found = xmp_orientation(xmp)
    return found if found in _TURNS else 1


def jpeg_in_one_pass(data: bytes | memoryview) -> bool:
    """Whether libjpeg decodes this JPEG line by line, and holds no coefficients of the whole picture in memory.

    It does so where one scan holds all colours. A progressive JPEG has several.
    """
    at, end, colours = 2, len(data) - 10, 0
    while at <= end:
        marker = data[at + 1] if data[at] == 0xFF else 0xFF
        if marker == 0xFF:
            at += 1
        elif marker == 0 or marker == 1 or 0xD0 <= marker <= 0xD9:
            at += 2
        elif marker == 0xDA:
            return colours > 0 and data[at + 4] == colours
        else:
            if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
                if marker not in (0xC0, 0xC1):
                    return False
                colours = data[at + 9]
            at += 2 + (data[at + 2] << 8 | data[at + 3])
    return False

"""The image of one row of a table: bytes, a path, a data URI or base64 text."""

from __future__ import annotations

import base64
import binascii
import math
import os
import re
import unicodedata
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from contrastive.shards.files import read_regular
from contrastive.shards.record import image_extension

URL_FAULT = "URL, not a file (download the images with img2dataset)"
MISSING_FAULT = "no such file"
LONGEST_DETAIL = 300  # characters of a value that is shown
LEAST_BASE64 = 40  # characters: the smallest image, a GIF of one pixel, has 35 bytes
LONG_BASE64 = 200  # characters from which text that begins like an image is not tried as a path first
# The first characters in base64 of JPEG (also urlsafe), PNG, GIF, WebP, BMP, TIFF, AVIF and HEIC, JPEG XL.
BASE64_STARTS = ("/9j/", "_9j_", "iVBORw0KGgo", "R0lGOD", "UklGR", "Qk", "SUkq", "TU0A", "AAAA", "/wo", "_wo")
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]{1,9})://", re.IGNORECASE)
_PACKED = re.compile(r"[A-Za-z0-9+/_-]+={0,2}")

# The bytes or None, why they are missing, and the value that this is about.
Found = tuple[bytes | None, str | None, str | None]


class ImageReader:
    """Reads the images that the rows of a table name; paths are relative to the table's folder.

    Args:
        folder: the folder that paths are relative to.
        allow_outside: read paths that leave the folder.
        name: the folder, as the fault of a path outside names it.
    """

    def __init__(self, folder: Path, allow_outside: bool, name: str = "the table's folder") -> None:
        self._outside = f"path outside {name}"
        self.folder, self.allow_outside = os.path.abspath(folder), allow_outside
        self._real = os.path.realpath(folder)

    def read(self, value: Any) -> Found:
        """The image of a cell. A cell without a value gives neither bytes nor a fault."""
        if type(value) is bytes:
            return self._from_bytes(value)
        if isinstance(value, dict):  # as the `datasets` library stores images
            inner = value.get("bytes") or value.get("path")
            return (None, None, None) if isinstance(inner, dict | list) else self.read(inner)
        if isinstance(value, list):
            if len(value) == 1:
                return self.read(value[0])
            return None, "a list of images, not one" if value else None, f"{len(value)} images"
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return None, None, None
        if isinstance(value, bytearray | memoryview):
            return self._from_bytes(bytes(value))
        if not isinstance(value, str):
            return None, "image is neither bytes nor a path", f"{value!r}"[:LONGEST_DETAIL]
        text = value.strip()
        return self._from_text(text) if text else (None, None, None)

    def _from_bytes(self, value: bytes) -> Found:
        if len(value) < 1024 and value and image_extension(value) is None:  # a path in a binary column
            try:
                text = value.decode().strip()
            except UnicodeDecodeError:
                text = ""
            if text.isprintable() and "." in text and not text.startswith("<"):
                found = self._from_text(text)
                if found[1] != MISSING_FAULT:
                    return found
        return value, None, None

    def _from_text(self, text: str) -> Found:
        if text[:5].lower() == "data:":
            return _from_data_uri(text)
        scheme = _SCHEME.match(text)
        if scheme and scheme[1].lower() != "file":
            return None, URL_FAULT, text[:LONGEST_DETAIL]
        if scheme:
            text = urllib.parse.unquote(urllib.parse.urlsplit(text).path)
        packed = is_base64_image(text)
        if packed and len(text) >= LONG_BASE64:
            return _from_base64(text)
        found = self._from_path(text)
        if packed and found[0] is None:
            return _from_base64(text)
        return found

    def _from_path(self, text: str) -> Found:
        first: Found | None = None
        for spelling in _spellings(text):
            found = self._from_file(os.path.join(self.folder, spelling))
            if found[0] is not None:
                return found
            first = first or found
            if found[1] != MISSING_FAULT:
                break
        assert first is not None
        return first

    def _from_file(self, path: str) -> Found:
        try:
            if not self.allow_outside:
                path = os.path.realpath(path)
                if os.path.commonpath([self._real, path]) != self._real:
                    return None, self._outside, path[:LONGEST_DETAIL]
            data, fault = read_regular(Path(path))
            if data is not None:
                return data, None, None
            if os.path.isdir(path):
                fault = "a folder, not a file"
            elif fault is None:
                fault = "file cannot be opened" if os.path.exists(path) else MISSING_FAULT
        except (OSError, ValueError):  # a name that no file can have
            fault = MISSING_FAULT
        return None, fault, path[:LONGEST_DETAIL]


def image_name(folder: str, value: Any) -> Any:
    """A value that is equal for rows of one image: the full path, or the bytes; None without a value."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, list):
        return image_name(folder, value[0]) if len(value) == 1 else None
    if isinstance(value, bytes):
        return value or None
    if not isinstance(value, str) or not (value := value.strip()):
        return None
    if "\\" in value and not os.path.lexists(os.path.join(folder, value)):
        value = value.replace("\\", "/")  # as `_spellings` reads it
    if "./" in value or "//" in value:
        value = value if _SCHEME.match(value) else os.path.normpath(value)
    if value.startswith("../"):
        return os.path.normpath(os.path.join(folder, value))
    return value if value[0] == "/" else f"{folder}/{value}"


def _spellings(text: str) -> Iterator[str]:
    """A path as it is written, then with the separators of this system, then in the other Unicode forms."""
    yield text
    forms = [text]
    if "\\" in text:
        forms.append(text.replace("\\", "/"))
        yield forms[-1]
    if not text.isascii():
        spelled = (unicodedata.normalize(form, one) for one in forms for form in ("NFC", "NFD"))
        yield from (one for one in dict.fromkeys(spelled) if one not in forms)


def _from_data_uri(text: str) -> Found:
    head, comma, body = text.partition(",")
    try:
        if not comma:
            raise ValueError
        plain = urllib.parse.unquote_to_bytes(body)
        return (_unpacked(plain.decode("ascii")) if head.lower().endswith(";base64") else plain), None, None
    except ValueError:
        return None, "data URI that cannot be read", text[:80]


def _from_base64(text: str) -> Found:
    try:
        return _unpacked(text), None, None
    except ValueError:
        return None, "base64 that cannot be read", text[:80]


def is_base64_image(text: str) -> bool:
    """Whether text begins as an image in base64."""
    return len(text) >= LEAST_BASE64 and text.startswith(BASE64_STARTS) and _begins_as_image(text)


def _begins_as_image(text: str) -> bool:
    head = "".join(text[:96].split())[:88]  # 66 bytes, of which `image_extension` needs FIRST_BYTES
    try:
        return _PACKED.fullmatch(head) is not None and image_extension(_unpacked(head)) is not None
    except ValueError:
        return False


def _unpacked(text: str) -> bytes:
    """The bytes of standard or urlsafe base64, with or without line breaks and padding. Raises ValueError."""
    text = "".join(text.split()).rstrip("=").replace("-", "+").replace("_", "/")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except binascii.Error as fault:
        raise ValueError(str(fault)) from None


def path_of(value: Any) -> str | None:
    """The path in an image cell as it is written; None where the cell holds the image itself, or nothing."""
    if isinstance(value, dict):
        value = value.get("path")
    if not isinstance(value, str) or len(value) > LONGEST_DETAIL or value[:5].lower() == "data:":
        return None
    text = value.strip()
    return text if "." in text and text.isprintable() else None  # base64 has no dot

"""What one shard holds: which members make pairs, and why the others do not. Reads headers, texts and first bytes only.

A pair is KEY.jpg (or another image extension) and KEY.txt, with KEY.json if there is one, anywhere in the same shard.
As in webdataset, a key ends at the first dot of the file's name.
"""

import hashlib
import json
import os
import unicodedata
import zlib
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from contrastive.shards.record import (
    FIRST_BYTES,
    IMAGE_EXTENSIONS,
    MAX_CAPTION_BYTES,
    MAX_IMAGE_BYTES,
    MAX_JSON_BYTES,
    image_extension,
)
from contrastive.shards.tar import DamagedShard, Member, members

MAX_DEPTH = 32  # of nested lists and objects in a .json member
# Of one shard: its names are held in memory, about 1.1 kB a member (seen), and whoever made the bytes says how many.
MAX_MEMBERS = 1_000_000  # far above any shard that is meant as one: `contrastive shard` cuts up a tar this large
MAX_NAMES = 64 << 20  # characters of all names
MAX_KINDS = 50  # extensions that are counted one by one
# Members that somebody's loader would run or unpickle. A shard with one of them is not for this purpose.
CODE = frozenset(
    "pickle pkl dill joblib pyd pth pt ckpt so dll dylib exe py pyc sh bat cmd jar class".split()
)  # fmt: skip
_COMPRESSED = frozenset("gz bz2 xz zst lz4".split())  # webdataset unpacks, then unpickles, a .pkl.gz
_NONE = Member("", 0, 0)


class Row(NamedTuple):
    """A pair: where its image, its text and its JSON lie in the shard, and what its caption and its image hash to."""

    key: str
    offsets: tuple[int, int, int]
    sizes: tuple[int, int, int]
    caption_id: int
    image_id: int


@dataclass
class Scan:
    """rejected: (key, reason) in order. ignored: members of other kinds, by extension."""

    rows: list[Row] = field(default_factory=list)
    rejected: list[tuple[str, str]] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    sha256: str = ""
    size: int = 0


def scan_shard(path: Path) -> Scan:
    """Raises DamagedShard, see `members`; also for a member that is code, and for more members than can be held."""
    found = Scan(size=path.stat().st_size)
    samples: dict[str, dict[str, Member]] = {}
    length = 0  # of all names
    for count, member in enumerate(members(path), 1):
        length += len(member.name)
        if count > MAX_MEMBERS or length > MAX_NAMES:
            what = f"more than {MAX_MEMBERS:,} members or {MAX_NAMES:,} characters in their names: make smaller shards"
            raise DamagedShard(path, member.offset - 512, what)
        folder, _, base = member.name.rpartition("/")
        stem, _, extension = base.partition(".")
        extension = extension.lower()
        if _is_code(extension):
            raise DamagedShard(path, member.offset - 512, f"{member.name!r} is code or a pickle, which no shard holds")
        kind = "image" if extension in IMAGE_EXTENSIONS else extension
        if not stem or kind not in ("image", "txt", "json"):
            known = extension in found.ignored or len(found.ignored) < MAX_KINDS
            found.ignored[extension if known else "others"] += 1
            continue
        key = f"{folder}/{stem}" if folder else stem
        parts = samples.setdefault(key, {})
        if kind in parts:
            found.rejected.append((key, "duplicate key"))
        parts.setdefault(kind, member)
    with open(path, "rb") as file:
        for key, parts in samples.items():
            image, text, info = (parts.get(kind, _NONE) for kind in ("image", "txt", "json"))
            reason, caption = _look(file.fileno(), image, text, info)
            if reason:
                found.rejected.append((key, reason))
                continue
            offsets, sizes = (image.offset, text.offset, info.offset), (image.size, text.size, info.size)
            data = os.pread(file.fileno(), image.size, image.offset)
            found.rows.append(Row(key, offsets, sizes, caption_id(caption), quick_image_id(data)))
    found.sha256 = sha256_of(path)
    return found


@lru_cache(maxsize=1024)  # a shard has few extensions and many members
def _is_code(extension: str) -> bool:
    parts = extension.split(".")
    while len(parts) > 1 and parts[-1] in _COMPRESSED:
        parts.pop()
    return parts[-1] in CODE


def sha256_of(path: Path) -> str:
    """Hexadecimal; the file is read a MiB at a time."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _look(file: int, image: Member, text: Member, info: Member) -> tuple[str, str]:
    """Why a sample is no pair ("" if it is one), and its caption."""
    if image is _NONE or text is _NONE:
        return ("no image" if image is _NONE else "no caption"), ""
    if image.size > MAX_IMAGE_BYTES:
        return "image too large", ""
    if text.size > MAX_CAPTION_BYTES or info.size > MAX_JSON_BYTES:
        return "text too long", ""
    try:
        caption = os.pread(file, text.size, text.offset).decode("utf-8").strip()
    except UnicodeDecodeError:
        return "caption not UTF-8", ""
    if not caption:
        return "empty caption", ""
    if image_extension(os.pread(file, FIRST_BYTES, image.offset)) is None:
        return "not an image", ""
    return json_fault(os.pread(file, info.size, info.offset)) if info.size else "", caption


def json_fault(data: bytes) -> str:
    """Why a .json member cannot be used; "" if it can."""
    try:
        value = json.loads(data)
    except RecursionError:
        return "JSON too deep"
    except ValueError:
        return "not JSON"
    layer, depth = [value], 0
    while layer := [x for x in layer if isinstance(x, list | dict)]:
        depth += 1
        if depth > MAX_DEPTH:
            return "JSON too deep"
        layer = [child for x in layer for child in (x.values() if isinstance(x, dict) else x)]
    return ""


def caption_id(caption: str) -> int:
    """A 64-bit signed hash of a caption, blind to case, white space and Unicode spelling."""
    plain = " ".join(unicodedata.normalize("NFKC", caption).casefold().split())
    return int.from_bytes(hashlib.blake2b(plain.encode(), digest_size=8).digest(), "little", signed=True)


def quick_image_id(data: bytes) -> int:
    """A 64-bit signed hash of an image file's size, its first and last KiB and the CRC of all of it.

    Equal files have equal ids. Files that differ have equal ones in one of 2^32 cases at most, and only where size,
    beginning and end are the same. BLAKE2 of all bytes (`filters.image_id`) makes indexing a half slower.
    """
    ends = b"%d %d " % (len(data), zlib.crc32(data)) + data[:1024] + data[-1024:]
    return int.from_bytes(hashlib.blake2b(ends, digest_size=8).digest(), "little", signed=True)

"""What one shard holds: which members make pairs, and why the others do not. Reads headers, texts and first bytes only.

A pair is KEY.jpg (or another image extension) and KEY.txt, with KEY.json if there is one, anywhere in the same shard.
Without KEY.txt the caption comes from KEY.json. As in webdataset, a key ends at the first dot of the file's name, so
that KEY.mask.png is another member of the sample KEY. Where that leaves no image for KEY, the last dot counts: a.1.jpg
and a.1.txt are a pair.
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

from contrastive.shards.listing import is_hidden
from contrastive.shards.record import (
    IMAGE_EXTENSIONS,
    MAX_CAPTION_BYTES,
    MAX_IMAGE_BYTES,
    MAX_JSON_BYTES,
    image_extension,
)
from contrastive.shards.tables import CAPTION_NAMES
from contrastive.shards.tar import DamagedShard, Member, members

MAX_DEPTH = 32  # of nested lists and objects in a .json member
# Of one shard: its names are held in memory, about 1.1 kB a member (seen), and whoever made the bytes says how many.
MAX_MEMBERS = 1_000_000  # far above any shard that is meant as one: `contrastive shard` cuts up a tar this large
MAX_NAMES = 64 << 20  # characters of all names
HIDDEN = "/hidden"  # counts members whose name begins with a dot, and those below __MACOSX. No extension has a slash
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
    dotted: list[tuple[Member, str, str, str]] = []
    length = 0  # of all names
    for count, member in enumerate(members(path), 1):
        length += len(member.name)
        if "./" in member.name:  # `tar cf x.tar .` writes ./a.jpg
            member = member._replace(name=_plain(member.name))
        if count > MAX_MEMBERS or length > MAX_NAMES:
            what = f"more than {MAX_MEMBERS:,} members or {MAX_NAMES:,} characters in their names: make smaller shards"
            raise DamagedShard(path, member.offset - 512, what)
        folder, _, base = member.name.rpartition("/")
        stem, _, extension = base.partition(".")
        extension = extension.lower()
        if _is_code(extension):
            raise DamagedShard(path, member.offset - 512, f"{member.name!r} is code or a pickle, which no shard holds")
        if not stem or (folder and _in_hidden(folder)):
            _ignore(found, HIDDEN)  # ._cat.jpg, __MACOSX/cat.jpg
            continue
        key = f"{folder}/{stem}" if folder else stem
        kind = "image" if extension in IMAGE_EXTENSIONS else extension
        if kind in ("image", "txt", "json"):
            _add(found, samples, key, kind, member)
        elif "." in extension:
            dotted.append((member, key, extension, base))
        else:
            _ignore(found, extension)
    _add_dotted(found, samples, dotted)
    _join_cases(samples)
    with open(path, "rb") as file:
        for key, parts in samples.items():
            image, text, info = parts.get("image", _NONE), parts.get("txt", _NONE), parts.get("json", _NONE)
            data = b"" if image.size > MAX_IMAGE_BYTES else os.pread(file.fileno(), image.size, image.offset)
            reason, caption = "caption of several images" if "second" in parts else "", ""
            if not reason:
                reason, caption = _look(file.fileno(), image, data, text, info)
            if reason:
                found.rejected.append((key, reason))
                continue
            offsets, sizes = (image.offset, text.offset, info.offset), (image.size, text.size, info.size)
            found.rows.append(Row(key, offsets, sizes, caption_id(caption), quick_image_id(data)))
    found.sha256 = sha256_of(path)
    return found


def _add(found: Scan, samples: dict[str, dict[str, Member]], key: str, kind: str, member: Member) -> None:
    parts = samples.get(key)
    if parts is None:
        samples[key] = {kind: member}
    elif kind not in parts:
        parts[kind] = member
    elif kind == "image" and _extension(member.name) != _extension(parts[kind].name):
        parts["second"] = member  # cat.jpg and cat.png: the caption may belong to either
    else:
        found.rejected.append((key, "duplicate key"))


def _add_dotted(found: Scan, samples: dict[str, dict[str, Member]], dotted: list[tuple[Member, str, str, str]]) -> None:
    """Members whose name has several dots: pairs of their own, or further members of the sample that is named first."""
    kinds: dict[str, set[str]] = {}
    for _, key, extension, _ in dotted:
        more, _, last = extension.rpartition(".")
        kinds.setdefault(f"{key}.{more}", set()).add("image" if last in IMAGE_EXTENSIONS else last)
    plain = {key for key, parts in samples.items() if "image" in parts}
    for member, key, extension, base in dotted:
        more, _, last = extension.rpartition(".")
        kind = "image" if last in IMAGE_EXTENSIONS else last
        own = kinds[f"{key}.{more}"]
        if kind not in ("image", "txt", "json") or (key in plain and not {"image", "txt"} <= own):
            _ignore(found, extension)
        elif key in plain:
            if kind == "image":
                found.rejected.append((f"{key}.{more}", "pair that may belong to another, by its first dot"))
        else:
            folder = member.name[: len(member.name) - len(base)]
            _add(found, samples, folder + base.rpartition(".")[0], kind, member)


def _join_cases(samples: dict[str, dict[str, Member]]) -> None:
    """Let IMG_1.JPG and img_1.txt be a pair, where no name is exactly the same and no other is as like."""
    lonely: dict[str, list[str]] = {}
    for key, parts in samples.items():
        if ("image" in parts) != ("txt" in parts):
            lonely.setdefault(key.casefold(), []).append(key)
    for keys in lonely.values():
        images = [key for key in keys if "image" in samples[key]]
        if len(keys) == 2 and len(images) == 1:
            (other,) = {*keys} - {*images}
            samples[images[0]] = {**samples.pop(other), **samples[images[0]]}


def _ignore(found: Scan, extension: str) -> None:
    known = extension in found.ignored or len(found.ignored) < MAX_KINDS
    found.ignored[extension if known else "others"] += 1


def _plain(name: str) -> str:
    """The name without components that mean the folder itself: a/b.jpg for ./a/./b.jpg."""
    return "/".join(part for part in name.split("/") if part != ".")


def ignored_reason(kind: str) -> str:
    """The reason to print for a key of `Scan.ignored`."""
    return "hidden (begins with a dot, or lies in such a folder or in __MACOSX)" if kind == HIDDEN else f".{kind}"


def _extension(name: str) -> str:
    return name.rpartition(".")[2].lower()


@lru_cache(maxsize=1024)
def _in_hidden(folder: str) -> bool:
    return any(map(is_hidden, folder.split("/")))


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


def _look(file: int, image: Member, data: bytes, text: Member, info: Member) -> tuple[str, str]:
    """Why a sample is no pair ("" if it is one), and its caption."""
    if image is _NONE or (text is _NONE and info is _NONE):
        return ("no image" if image is _NONE else "no caption"), ""
    if image.size > MAX_IMAGE_BYTES:
        return "image too large", ""
    if text.size > MAX_CAPTION_BYTES or info.size > MAX_JSON_BYTES:
        return "text too long", ""
    caption = ""
    if text is not _NONE:
        try:
            caption = caption_text(os.pread(file, text.size, text.offset))
        except UnicodeDecodeError:
            return "caption not UTF-8", ""
        if not caption:
            return "empty caption", ""
    if image_extension(data) is None:
        return "not an image", ""
    more = os.pread(file, info.size, info.offset) if info.size else b""
    if more and (fault := json_fault(more)):
        return fault, ""
    return ("", caption) if caption else _of_json(more)


def caption_text(data: bytes) -> str:
    """The caption of a .txt file: all of it, without a byte order mark and white space at its ends.

    Raises UnicodeDecodeError where it is not UTF-8.
    """
    return data.decode("utf-8").removeprefix("\ufeff").strip()


def _of_json(data: bytes) -> tuple[str, str]:
    captions = json_captions(json.loads(data)) if data else ()
    if not captions:
        return "no caption", ""
    try:
        size = len(captions[0].encode())
    except UnicodeEncodeError:  # half of a surrogate pair, as JSON can spell one
        return "caption not UTF-8", ""
    return ("text too long", "") if size > MAX_CAPTION_BYTES else ("", captions[0])


def json_captions(value: object) -> tuple[str, ...]:
    """The captions in a .json member: of the first of CAPTION_NAMES that holds a text or a list of texts."""
    if not isinstance(value, dict):
        return ()
    for name in (*CAPTION_NAMES, "captions"):
        found = value.get(name)
        texts = [text.strip() for text in (found if isinstance(found, list) else [found]) if isinstance(text, str)]
        if any(texts):
            return tuple(dict.fromkeys(filter(None, texts)))
    return ()


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
    """A 64-bit signed hash of an image file's size, its first and last 256 bytes and the CRC of all of it.

    Equal files have equal ids. Files that differ have equal ones in one of 2^32 cases at most, and only where size,
    beginning and end are the same. BLAKE2 of all bytes (`filters.image_id`) makes indexing a half slower.
    """
    ends = b"%d %d " % (len(data), zlib.crc32(data)) + data[:256] + data[-256:]
    return int.from_bytes(hashlib.blake2b(ends, digest_size=8).digest(), "little", signed=True)

"""Strict reading of tar headers. Nothing is ever extracted.

Python's `tarfile` takes a damaged header for the end of the archive, so that half a shard vanishes without
an error. Here only two zero blocks end an archive, and everything else that is not a good header is an error. So is
what a shard has no use for and an attacker has: links, devices, sparse files, names that lead out of a folder.
"""

import os
import re
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from contrastive.errors import UserError

BLOCK = 512
MAX_EXTENSION = 1 << 16  # bytes of a GNU long name or a pax header
MAX_NAME = 4096  # characters: Linux allows no longer path
_ZERO = bytes(BLOCK)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_USELESS = {
    b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a named pipe",
    b"S": "a sparse file",
}  # fmt: skip


class DamagedShard(UserError):
    """A shard that cannot be trusted: nothing of it is used. `what` is the fault with its offset, without the path."""

    def __init__(self, path: Path, at: int, what: str) -> None:
        self.path, self.what = path, f"{what}, at byte {at}"
        super().__init__(f"{path}: {self.what}; write or copy this shard again")

    def __reduce__(self) -> tuple[Any, ...]:
        return UserError, (str(self),)


class Member(NamedTuple):
    """A regular file in a tar: its name, and where its bytes lie in the archive."""

    name: str
    offset: int
    size: int


def members(path: Path) -> Iterator[Member]:
    """The regular files of a tar in order (ustar, GNU and pax names); folders are passed over.

    Raises DamagedShard for a damaged header, a file that is cut off, data after the end, a compressed archive,
    anything but files and folders, a name that is absolute, too long, holds ".." or a control character.
    """
    # A named pipe that is called x.tar would be waited for, without an end, if it were opened as a file is.
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        yield from _members(path, file)
    finally:
        os.close(file)


def _members(path: Path, file: int) -> Iterator[Member]:
    found = os.fstat(file)
    if not stat.S_ISREG(found.st_mode):
        raise DamagedShard(path, 0, "not a regular file")
    length = found.st_size
    if length == 0:
        raise DamagedShard(path, 0, "the file is empty")
    first = os.pread(file, BLOCK, 0)
    for mark, kind_of in _COMPRESSED.items():
        if first.startswith(mark):
            raise DamagedShard(path, 0, f"compressed with {kind_of}, which cannot be read by offset: unpack it")
    at = 0
    long_name: str | None = None  # from a GNU or pax header, for the member that follows it
    long_size: int | None = None
    while True:
        header = os.pread(file, BLOCK, at)
        if len(header) < BLOCK:
            raise DamagedShard(path, at, "the file is cut off: no end-of-archive mark")
        if header == _ZERO:
            if os.pread(file, BLOCK, at + BLOCK) != _ZERO:
                raise DamagedShard(path, at, "a zero block where a header should be, or the end is cut off")
            _check_tail(path, file, at + 2 * BLOCK)
            return
        if not _checksum_good(header):
            raise DamagedShard(path, at, "damaged header (checksum)")
        kind = header[156:157]
        size = _number(path, at, header[124:136]) if long_size is None else long_size
        if kind in _USELESS:
            raise DamagedShard(path, at, f"{_USELESS[kind]} instead of a file")
        if kind == b"5":  # a folder: nothing follows the header
            size = 0
        if kind in b"LKxg" and size > MAX_EXTENSION:
            raise DamagedShard(path, at, f"a name or pax header of {size} bytes")
        start = at + BLOCK
        if start + size > length:
            raise DamagedShard(path, at, f"the file is cut off: a member of {size} bytes does not fit")
        if kind == b"L":
            long_name = _text(os.pread(file, size, start).rstrip(b"\0"))
        elif kind == b"x":
            fields = _pax(path, at, os.pread(file, size, start))
            long_name = fields.get("path", long_name)
            long_size = _pax_size(path, at, fields)
        elif kind in b"0\0":
            name = long_name if long_name is not None else _name(header)
            _check_name(path, at, name)
            yield Member(name, start, size)
        elif kind not in b"Kg5":
            raise DamagedShard(path, at, f"a member of unknown type {kind!r}")
        if kind not in b"LKxg":
            long_name = long_size = None
        at = start + -(-size // BLOCK) * BLOCK


def _check_name(path: Path, at: int, name: str) -> None:
    if len(name) > MAX_NAME:
        raise DamagedShard(path, at, f"a name of {len(name):,} characters")
    if name.startswith("/") or (".." in name and ".." in name.split("/")) or _CONTROL.search(name):
        raise DamagedShard(path, at, f"a member named {name[:80]!r}, which leads out of a folder or cannot be printed")


def _check_tail(path: Path, file: int, at: int) -> None:
    # Tars joined by `cat` hold more members after the first end mark: they would be lost silently.
    while rest := os.pread(file, 1 << 20, at):
        if rest.strip(b"\0"):
            raise DamagedShard(path, at, "data after the end-of-archive mark")
        at += len(rest)


def _checksum_good(header: bytes) -> bool:
    try:
        stored = int(header[148:156].strip(b" \0") or b"-1", 8)
    except ValueError:
        return False
    field = header[148:156]  # counts as eight spaces
    total = _sum(header[:256]) + _sum(header[256:]) - sum(field) + 256
    if stored == total:
        return True
    signed = sum(byte > 127 for byte in header) - sum(byte > 127 for byte in field)
    return stored == total - 256 * signed  # old writers summed signed bytes


def _sum(data: bytes) -> int:
    """The sum of at most 256 bytes: Adler-32 holds it plus one, and is eight times as fast as `sum`."""
    return (zlib.adler32(data) & 0xFFFF) - 1


def _number(path: Path, at: int, field: bytes) -> int:
    if field[0] & 0x80:  # base 256: sizes of 8 GiB and more
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0") or b"0"
    if digits.strip(b"01234567"):  # int() would take a sign, and a negative size leads back and round for ever
        raise DamagedShard(path, at, "damaged header (size)")
    return int(digits, 8)


def _name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return _text(prefix + b"/" + name if prefix else name)


def _pax(path: Path, at: int, data: bytes) -> dict[str, str]:
    fields, start = {}, 0
    data = data.rstrip(b"\0")
    while start < len(data):
        try:
            space = data.index(b" ", start, start + 8)
            end = start + int(data[start:space])
            key, value = data[space + 1 : end - 1].split(b"=", 1)
        except ValueError:
            raise DamagedShard(path, at, "damaged pax header") from None
        if end <= space or end > len(data) or data[end - 1 : end] != b"\n":
            raise DamagedShard(path, at, "damaged pax header")
        if key.startswith(b"GNU.sparse"):
            raise DamagedShard(path, at, "a sparse file instead of a file")
        fields[_text(key)] = _text(value)
        start = end
    return fields


def _pax_size(path: Path, at: int, fields: dict[str, str]) -> int | None:
    size = fields.get("size")
    if size is None:
        return None
    if not (size.isascii() and size.isdigit() and len(size) < 20):
        raise DamagedShard(path, at, "damaged pax header (size)")
    return int(size)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")

"""Strict reading of tar headers.

Python's `tarfile` takes a damaged header for the end of the archive, so that half a shard vanishes without
an error. Here only two zero blocks end an archive, and everything else that is not a good header is an error.
"""

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from contrastive.errors import UserError

BLOCK = 512
_ZERO = bytes(BLOCK)


class Member(NamedTuple):
    """A regular file in a tar: its name, and where its bytes lie in the archive."""

    name: str
    offset: int
    size: int


def members(path: Path) -> Iterator[Member]:
    """The regular files of a tar in order (ustar, GNU and pax names).

    Raises UserError, naming the shard and the offset, for a damaged header, a file that is cut off, or data
    after the end.
    """
    if path.stat().st_size == 0:
        raise _fault(path, 0, "the file is empty")
    with (
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        yield from _members(path, data)


def _members(path: Path, data: mmap.mmap) -> Iterator[Member]:
    at = 0
    long_name: str | None = None  # from a GNU or pax header, for the member that follows it
    long_size: int | None = None
    while True:
        header = data[at : at + BLOCK]
        if len(header) < BLOCK:
            raise _fault(path, at, "the file is cut off: no end-of-archive mark")
        if header == _ZERO:
            if data[at + BLOCK : at + 2 * BLOCK] != _ZERO:
                raise _fault(
                    path,
                    at,
                    "a zero block where a header should be, or the end is cut off",
                )
            _check_tail(path, data, at + 2 * BLOCK)
            return
        if not _checksum_good(header):
            raise _fault(path, at, "damaged header (checksum)")
        kind = header[156:157]
        size = _number(path, at, header[124:136]) if long_size is None else long_size
        if kind in b"123456":  # links, devices, folders: nothing follows the header
            size = 0
        start = at + BLOCK
        if start + size > len(data):
            raise _fault(path, at, f"the file is cut off: a member of {size} bytes does not fit")
        if kind == b"L":
            long_name = _text(data[start : start + size].rstrip(b"\0"))
        elif kind == b"x":
            fields = _pax(path, at, data[start : start + size])
            long_name = fields.get("path", long_name)
            long_size = int(fields["size"]) if "size" in fields else None
        elif kind in b"0\0" or kind == b"7":
            yield Member(long_name if long_name is not None else _name(header), start, size)
        elif kind not in b"Kg123456":
            raise _fault(path, at, f"a member of unknown type {kind!r}")
        if kind not in b"LKxg":
            long_name = long_size = None
        at = start + -(-size // BLOCK) * BLOCK


def _check_tail(path: Path, data: mmap.mmap, at: int) -> None:
    # Tars joined by `cat` hold more members after the first end mark: they would be lost silently.
    for start in range(at, len(data), 1 << 20):
        if data[start : start + (1 << 20)].strip(b"\0"):
            raise _fault(path, at, "data after the end-of-archive mark")


def _checksum_good(header: bytes) -> bool:
    try:
        stored = int(header[148:156].strip(b" \0") or b"-1", 8)
    except ValueError:
        return False
    plain = header[:148] + b" " * 8 + header[156:]
    if stored == sum(plain):
        return True
    return stored == sum(plain) - 256 * sum(byte > 127 for byte in plain)  # old writers summed signed bytes


def _number(path: Path, at: int, field: bytes) -> int:
    if field[0] & 0x80:  # base 256: sizes of 8 GiB and more
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        raise _fault(path, at, "damaged header (size)") from None


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0")[0]
    prefix = header[345:500].split(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return _text(prefix + b"/" + name if prefix else name)


def _pax(path: Path, at: int, data: bytes) -> dict[str, str]:
    fields = {}
    while data.strip(b"\0"):
        try:
            length = int(data[: data.index(b" ")])
            key, value = data[data.index(b" ") + 1 : length - 1].split(b"=", 1)
        except ValueError:
            raise _fault(path, at, "damaged pax header") from None
        fields[_text(key)] = _text(value)
        data = data[length:]
    return fields


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _fault(path: Path, at: int, what: str) -> UserError:
    return UserError(f"{path}: {what}, at byte {at}; write or copy this shard again")

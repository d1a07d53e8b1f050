"""Tar files for the tests of faults, made by Python's tarfile."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

Files = Iterable[tuple[str, bytes]]


def image(grey: int = 0, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (grey % 256, grey // 256 % 256, 77)).save(buffer, format)
    return buffer.getvalue()


def pairs(count: int, first: int = 0) -> list[tuple[str, bytes]]:
    """`count` pairs, adjacent, each of three blocks for the image and two for the text."""
    found = []
    for i in range(first, first + count):
        found += [(f"p{i:04d}.png", image(i)), (f"p{i:04d}.txt", f"caption {i}".encode())]
    return found


def write_tar(path: Path, files: Files, *others: tarfile.TarInfo) -> Path:
    """A tar of regular files, and then of members without content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for member in others:
            tar.addfile(member)
    return path


def header_of(path: Path, name: str) -> int:
    """Where the header of a member starts."""
    with tarfile.open(path) as tar:
        return tar.getmember(name).offset

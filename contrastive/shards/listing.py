"""The files below a folder by kind. What is hidden is passed over; everything else is read or counted."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from contrastive.errors import UserError
from contrastive.shards.record import FIRST_BYTES, IMAGE_EXTENSIONS, image_extension

TABLES = {"parquet": "parquet", "csv": "csv", "tsv": "csv", "jsonl": "jsonl"}  # extension: kind
# Left by operating systems, viewers and servers. What begins with a dot is hidden too.
_SYSTEM = frozenset(
    ("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "@eadir", "$recycle.bin",
     "system volume information")
)  # fmt: skip
# A TIFF reader finds a small preview in a camera's raw file. The preview is not the photograph.
_RAW = frozenset(
    "3fr arw cr2 cr3 crw dcr dng erf iiq kdc mrw nef nrw orf pef raf raw rw2 rwl sr2 srf srw x3f".split()
)  # fmt: skip
_UNFINISHED = frozenset("bak orig old tmp part partial crdownload download".split())
_PACKED = {"gz": "gunzip", "tgz": "gunzip", "bz2": "bunzip2", "tbz2": "bunzip2", "xz": "unxz", "txz": "unxz"}
_PACKED.update({"zst": "zstd -d", "tzst": "zstd -d", "lz4": "lz4 -d -m"})


@dataclass
class Listing:
    """Files below a folder, each list sorted by path. folders: all sub-folders. hidden: number of hidden images."""

    images: list[Path] = field(default_factory=list)
    texts: list[Path] = field(default_factory=list)
    tables: list[Path] = field(default_factory=list)
    shards: list[Path] = field(default_factory=list)
    packed: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    hidden: int = 0

    def only(self, root: Path, level: int, names: set[str]) -> Listing:
        """The files in folders of these names at a level below `root`; 0 is the first level."""

        def inside(files: list[Path]) -> list[Path]:
            return [file for file in files if {*file.relative_to(root).parts[level : level + 1]} <= names]

        lists = {one.name: inside(getattr(self, one.name)) for one in fields(self) if one.name != "hidden"}
        return Listing(**lists, hidden=self.hidden)


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name holds nothing of the user's: .git, ._a.jpg, __MACOSX, Thumbs.db."""
    return name.startswith(".") or name.lower() in _SYSTEM


def list_folder(folder: Path) -> Listing:
    """All files at any depth. A folder that links lead to again is listed once."""
    found: list[Path] = []
    listing = Listing()
    for at, folders, names in _walk(folder):
        listing.hidden += sum(name.startswith(".") and _is_picture_name(name) for name in names)
        listing.hidden += sum(_hidden_images(at / name) for name in folders if name.startswith("."))
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        listing.folders += (at / name for name in folders)
        found += (at / name for name in names if not is_hidden(name))
    return list_files(sorted(found), listing)


def list_files(files: Iterable[Path], listing: Listing | None = None) -> Listing:
    """Files by kind. The extension decides where it is known, else the first bytes."""
    listing = Listing() if listing is None else listing
    for file in files:
        extension = _extension(file)
        if extension in IMAGE_EXTENSIONS:
            listing.images.append(file)
        elif extension == "txt":
            listing.texts.append(file)
        elif extension in TABLES:
            listing.tables.append(file)
        elif extension == "tar":
            listing.shards.append(file)
        elif unpacker(file):
            listing.packed.append(file)
        elif _may_be_image(extension) and is_image(file):
            listing.images.append(file)
        else:
            listing.others.append(file)
    return listing


def unread_reason(file: Path) -> str:
    """The reason to count a file by that is not read, such as ".mp4"."""
    extension = _extension(file)
    if not extension:
        return "no extension"
    more = " (camera raw)" if extension in _RAW else " (a table: give it by name)" if extension in TABLES else ""
    return f".{extension[:20]}{more}"


def unpacker(file: Path) -> str | None:
    """The command that unpacks a compressed tar; None for a file of another name."""
    last = _extension(file)
    if last not in _PACKED or (not last.startswith("t") and _extension(Path(file.stem)) != "tar"):
        return None
    return _PACKED[last]


def not_unpacked(packed: Iterable[Path], shards: Iterable[Path]) -> list[Path]:
    """The compressed tars whose unpacked file is not among the shards."""
    unpacked = {shard.with_suffix("") for shard in shards}

    def plain(file: Path) -> Path:
        one = file.with_suffix("")
        return one.with_suffix("") if _extension(one) == "tar" else one

    return [file for file in packed if plain(file) not in unpacked]


def packed_error(files: Sequence[Path]) -> UserError:
    """The error for compressed tars."""
    one = files[0]
    where, what, names = one, "a compressed tar", str(one)
    if len(files) > 1:
        where, what = one.parent, f"{len(files):,} compressed tars, the first is {one.name}"
        names = str(one.with_name(f"*{''.join(one.suffixes[-2:])}"))
    return UserError(f"{where}: {what}; shards are read by offset, so unpack first: {unpacker(one)} {names}")


def is_image(file: Path) -> bool:
    """Whether the first bytes are those of a picture; False where the file cannot be read."""
    try:
        handle = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        try:
            return stat.S_ISREG(os.fstat(handle).st_mode) and image_extension(os.read(handle, FIRST_BYTES)) is not None
        finally:
            os.close(handle)
    except OSError:
        return False


def _may_be_image(extension: str) -> bool:
    return not (
        extension in _RAW or extension in _UNFINISHED or extension.endswith(("~", "_original")) or extension == "json"
    )


def _extension(file: Path) -> str:
    return file.suffix[1:].lower()


def _walk(folder: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    seen: set[str] = set()
    for at, folders, names in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(at))
        folders[:] = [name for name in folders if os.path.realpath(os.path.join(at, name)) not in seen]
        yield Path(at), folders, names


def _hidden_images(folder: Path) -> int:
    if folder.name in (".git", ".hg", ".svn"):  # many files, none of them the user's pictures
        return 0
    return sum(_is_picture_name(name) for _, _, names in os.walk(folder) for name in names)


def _is_picture_name(name: str) -> bool:
    # macOS writes ._cat.jpg, which holds no picture, next to cat.jpg
    return not name.startswith("._") and _extension(Path(name)) in IMAGE_EXTENSIONS

"""Opening whatever a user has: tables, image folders, shards. All of them become a stream of records."""

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from contrastive.errors import UserError
from contrastive.shards.folder import ImageFolder
from contrastive.shards.index import PathLike, ShardIndex, open_index
from contrastive.shards.record import IMAGE_EXTENSIONS, Record, Source
from contrastive.shards.tables import CsvSource, JsonLinesSource, ParquetSource


class ShardSource(Source):
    """The pairs of existing tar shards, in order."""

    kind = "shards"

    def __init__(self, index: ShardIndex) -> None:
        self.index, self.columns = index, []

    def _records(self) -> Iterator[Record]:
        return (self.index.record(i) for i in range(len(self.index)))

    def _count(self) -> int:
        return len(self.index)


def open_source(
    path: PathLike | Sequence[PathLike],
    *,
    image: str | None = None,
    caption: str | None = None,
    label: str | None = None,
    limit: int | None = None,
) -> Source:
    """Open a folder, file, glob or list of files as a stream of records; nothing is decoded.

    Tables (.parquet, .csv, .tsv, .jsonl): `image`, `caption` and `label` name the columns, and are guessed
    from the usual names where not given. The image is bytes (Parquet) or a path relative to the table.
    Folders: of .tar shards, of images (with sidecar .txt captions, or one sub-folder a class), or of tables.

    Raises UserError: no such path, empty folder, mixed kinds, no such column (the columns found are listed).
    """
    root, files = _expand(path)
    kind = _kind(path, files)
    if kind in ("shards", "images") and (image or caption or label):
        raise UserError(f"{path}: columns can be named for a table only, and this is a set of {kind}")
    source: Source
    if kind == "shards":
        source = ShardSource(open_index(path if root is not None else files))
    elif kind == "images":
        source = ImageFolder(root, files)
    else:
        tables = {"parquet": ParquetSource, "csv": CsvSource, "jsonl": JsonLinesSource}
        source = tables[kind](files, image, caption, label)
    if limit is not None and limit < 1:
        raise UserError(f"limit {limit}: give at least 1")
    source.limit = limit
    return source


_KINDS = {
    "parquet": "parquet",
    "csv": "csv",
    "tsv": "csv",
    "jsonl": "jsonl",
    "tar": "shards",
}
_KINDS.update(dict.fromkeys(IMAGE_EXTENSIONS, "images"))


def _suffix_kind(file: Path) -> str | None:
    return _KINDS.get(file.suffix[1:].lower())


def _expand(path: PathLike | Sequence[PathLike]) -> tuple[Path | None, list[Path]]:
    """The folder, where the path is one, and the files that it stands for."""
    if not isinstance(path, str | os.PathLike):
        files = [Path(p) for p in path]
    elif Path(path).is_dir():
        return Path(path), _folder_files(Path(path))
    elif Path(path).exists():
        files = [Path(path)]
    else:
        files = sorted(Path(p) for p in glob.glob(os.fspath(path), recursive=True))
    if not files:
        raise UserError(f"{path}: no such file or folder")
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: {'a folder in a list of files' if file.is_dir() else 'no such file'}")
    return None, files


def _folder_files(folder: Path) -> list[Path]:
    """Shards come first, then images at any depth, then tables: one beside images must be named."""
    top = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    shards = [p for p in top if p.suffix == ".tar"]
    if shards:
        return shards
    below = (Path(at) / name for at, _, names in os.walk(folder, followlinks=True) for name in names)
    images = sorted(p for p in below if _suffix_kind(p) == "images" and not p.name.startswith("."))
    if images:
        return images
    for kind in ("parquet", "jsonl", "csv"):
        tables = [p for p in top if _suffix_kind(p) == kind]
        if tables:
            return tables
    raise UserError(f"{folder}: no images, tables (.parquet, .csv, .tsv, .jsonl) or .tar shards in this folder")


def _kind(path: PathLike | Sequence[PathLike], files: list[Path]) -> str:
    kinds = {_suffix_kind(file) for file in files}
    if None in kinds:
        odd = next(file for file in files if _suffix_kind(file) is None)
        raise UserError(f"{odd}: unknown kind of file; known are .parquet, .csv, .tsv, .jsonl, .tar and images")
    if len(kinds) > 1:
        raise UserError(f"{path}: files of several kinds ({', '.join(sorted(map(str, kinds)))}); give one kind")
    return str(kinds.pop())

"""Opening whatever a user has: tables, image folders, shards. All of them become a stream of records."""

import glob
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from contrastive.errors import UserError
from contrastive.shards.csv_table import CsvSource
from contrastive.shards.folder import ImageFolder
from contrastive.shards.hf_disk import DiskSource, is_saved_dataset
from contrastive.shards.index import PathLike, ShardIndex, open_index
from contrastive.shards.json_lines import JsonLinesSource
from contrastive.shards.parquet_table import ParquetSource
from contrastive.shards.record import IMAGE_EXTENSIONS, Part, Record, Rejected, SkippedRow, Source
from contrastive.shards.tables import TableSource


class ShardSource(Source):
    """The pairs of existing tar shards, in order."""

    kind = "shards"

    def __init__(self, index: ShardIndex) -> None:
        self.index, self.columns = index, []

    @property
    def rejected(self) -> Mapping[str, int]:
        return self.index.rejected if self.limit is None else {}

    def rejections(self) -> Iterator[SkippedRow]:
        for one in self.index.manifest["rejected"] if self.limit is None else ():
            yield SkippedRow(one["key"], one["reason"], place=one["shard"])

    def identity(self) -> dict[str, Any]:
        return {"kind": self.kind, "fingerprint": self.index.fingerprint, "limit": self.limit}

    def _row_starts(self) -> Iterator[Iterable[int]]:
        yield range(len(self.index))

    def read(self, part: Part) -> Iterator[Record]:
        for segment in part.segments:
            yield from map(self._record, range(segment.at, segment.at + segment.rows))

    def _records(self) -> Iterator[Record]:
        return map(self._record, range(len(self.index)))

    def _record(self, i: int) -> Record:
        try:
            return self.index.record(i)
        except Rejected as rejected:
            return Record(self.index.key(i), None, fault=rejected.reason)

    def _count(self) -> int:
        return len(self.index)


def open_source(
    path: PathLike | Sequence[PathLike],
    *,
    image: str | None = None,
    caption: str | None = None,
    label: str | None = None,
    limit: int | None = None,
    allow_outside: bool = True,
    group: bool | None = None,
) -> Source:
    """Open a folder, file, glob or list of files as a stream of records; nothing is decoded.

    Tables (.parquet, .csv, .tsv, .jsonl): `image`, `caption` and `label` name the columns, and are guessed
    from the usual names where not given. The image is bytes (Parquet) or a path relative to the table.
    Rows with the same image are one record with several captions: where the image column is text (group=None), also
    where it holds bytes (True), nowhere (False). `limit` counts records.
    Without `allow_outside`, a path that leaves the table's folder is not read: the record's fault says so.
    Folders: of .tar shards, of images (with sidecar .txt captions, or one sub-folder a class), of tables, or
    written by `save_to_disk` of Hugging Face's `datasets`.

    Raises UserError: no such path, empty folder, mixed kinds, no such column (the columns found are listed).
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit {limit}: give at least 1")
    source = _open(path, image, caption, label, group)
    source.limit = limit
    if isinstance(source, TableSource):
        source.allow_outside = allow_outside
    return source


def _open(
    path: PathLike | Sequence[PathLike],
    image: str | None,
    caption: str | None,
    label: str | None,
    group: bool | None,
) -> Source:
    if isinstance(path, str | os.PathLike) and is_saved_dataset(Path(path)):
        return DiskSource(Path(path), image, caption, label, group)
    root, files = _expand(path)
    kind = _kind(path, files)
    if kind in ("shards", "images") and (image or caption or label):
        raise UserError(f"{path}: columns can be named for a table only, and this is a set of {kind}")
    if kind == "shards":
        return ShardSource(open_index(path if root is not None else files))
    if kind == "images":
        return ImageFolder(root, files)
    tables = {"parquet": ParquetSource, "csv": CsvSource, "jsonl": JsonLinesSource}
    return tables[kind](files, image, caption, label, group)


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
    images = sorted(p for p in _below(folder) if _suffix_kind(p) == "images" and not p.name.startswith("."))
    if images:
        return images
    for kind in ("parquet", "jsonl", "csv"):
        tables = [p for p in top if _suffix_kind(p) == kind]
        if tables:
            return tables
    raise UserError(f"{folder}: no images, tables (.parquet, .csv, .tsv, .jsonl) or .tar shards in this folder")


def _below(folder: Path) -> Iterator[Path]:
    """Files at any depth; a folder that links lead to again is gone through once."""
    seen: set[str] = set()
    for at, folders, names in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(at))
        folders[:] = [name for name in folders if os.path.realpath(os.path.join(at, name)) not in seen]
        yield from (Path(at) / name for name in names)


def _kind(path: PathLike | Sequence[PathLike], files: list[Path]) -> str:
    kinds = {_suffix_kind(file) for file in files}
    if None in kinds:
        odd = next(file for file in files if _suffix_kind(file) is None)
        raise UserError(f"{odd}: unknown kind of file; known are .parquet, .csv, .tsv, .jsonl, .tar and images")
    if len(kinds) > 1:
        raise UserError(f"{path}: files of several kinds ({', '.join(sorted(map(str, kinds)))}); give one kind")
    return str(kinds.pop())

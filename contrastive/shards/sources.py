"""Opening whatever a user has: tables, image folders, shards. All of them become a stream of records."""

import glob
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from contrastive.errors import UserError
from contrastive.shards.csv_table import CsvSource
from contrastive.shards.folder import ImageFolder
from contrastive.shards.hf_disk import DiskSource, is_saved_dataset, saved_splits
from contrastive.shards.index import PathLike, open_index
from contrastive.shards.json_lines import JsonLinesSource
from contrastive.shards.json_sets import JsonSet
from contrastive.shards.listing import (
    TABLES,
    Listing,
    list_files,
    list_folder,
    not_unpacked,
    packed_error,
    unread_reason,
)
from contrastive.shards.metadata import count_unnamed, metadata_tables
from contrastive.shards.parquet_table import ParquetSource
from contrastive.shards.paths import refuse_no_path
from contrastive.shards.record import Source
from contrastive.shards.shard_source import ShardSource
from contrastive.shards.splits import (
    check_configurations,
    check_parts,
    choose_split,
    group_by_split,
    several_splits,
    split_level,
    wanted_splits,
)
from contrastive.shards.tables import TableSource
from contrastive.wording import first_few


def open_source(
    path: PathLike | Sequence[PathLike],
    *,
    image: str | None = None,
    caption: str | None = None,
    label: str | None = None,
    limit: int | None = None,
    allow_outside: bool = True,
    group: bool | None = None,
    split: str | None = None,
    images: str | None = None,
) -> Source:
    """Open a folder, file, glob or list of files as a stream of records; nothing is decoded.

    `docs/shards.md` lists the kinds of input. Files that are not read are counted in `rejected`.

    Args:
        path: a folder of .tar shards, of images, of tables, or written by `save_to_disk` of Hugging Face's `datasets`;
            a table (.parquet, .csv, .tsv, .jsonl), COCO's or Karpathy's .json; a glob or a list of files of one kind.
        image, caption, label: columns of a table, guessed from the usual names where None. The image is bytes
            (Parquet) or a path relative to the table.
        limit: read the first records only.
        allow_outside: also read paths that leave the folder of the table; else the record's fault says so.
        group: rows of a table with the same image are one record with several captions: where the image column is text
            (None), also where it holds bytes (True), nowhere (False). `limit` counts records.
        split: the split to read, where there are several: "train", or "train+val".
        images: the folder of the images that a .json names; looked for next to it where None.

    Raises UserError: no such path, empty folder, mixed kinds, several splits and none chosen, no such column (the
    columns found are listed).
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit {limit}: give at least 1")
    source = _open(path, _Asked(image, caption, label, group, split, images))
    source.limit = limit
    if isinstance(path, str | os.PathLike):
        source.name = f"{os.fspath(path)} (split {split})" if split else os.fspath(path)
    if isinstance(source, TableSource | JsonSet):
        source.allow_outside = allow_outside
    return source


@dataclass(frozen=True)
class _Asked:
    image: str | None
    caption: str | None
    label: str | None
    group: bool | None
    split: str | None
    images: str | None

    def table(self, files: list[Path]) -> TableSource:
        kinds: dict[str, Any] = {"parquet": ParquetSource, "csv": CsvSource, "jsonl": JsonLinesSource}
        return kinds[_table_kind(files[0])](files, self.image, self.caption, self.label, self.group)

    def refuse(self, path: object, kind: str, *, columns: bool = True, split: bool = True, images: bool = True) -> None:
        """Raise UserError for arguments that mean nothing for this kind of source."""
        if columns and (self.image or self.caption or self.label):
            raise UserError(f"{path}: columns can be named for a table only, and this is a set of {kind}")
        if columns and self.group:  # False asks for what holds already
            raise UserError(f"--group: is for the rows of a table, and {path} is a set of {kind}; leave it out")
        if split and self.split:
            raise UserError(f"--split {self.split}: {path} holds no splits; leave it out")
        if images and self.images:
            raise UserError(f"--images {self.images}: is for COCO's .json files, and {path} is a set of {kind}")


def _open(path: PathLike | Sequence[PathLike], asked: _Asked) -> Source:
    if not isinstance(path, str | os.PathLike):
        return _open_files(path, [_existing(Path(one)) for one in path], asked)
    if not os.path.lexists(path):
        refuse_no_path(os.fspath(path))
    if Path(path).is_dir():
        return _open_folder(Path(path), asked)
    if Path(path).exists():
        return _open_files(path, [_existing(Path(path))], asked)
    found = sorted(Path(one) for one in glob.glob(os.fspath(path), recursive=True))
    if not found:
        raise UserError(f"{path}: no such file or folder")
    return _open_files(path, [_existing(file) for file in found], asked)


def _existing(file: Path) -> Path:
    if not file.is_file():
        raise UserError(f"{file}: {'a folder in a list of files' if file.is_dir() else 'no such file'}")
    return file


def _open_files(path: PathLike | Sequence[PathLike], files: list[Path], asked: _Asked) -> Source:
    if len(files) == 1 and files[0].suffix.lower() == ".json":
        asked.refuse(path, "COCO or Karpathy captions", split=False, images=False)
        return JsonSet(files[0], asked.images, asked.split)
    found = list_files(files)
    if found.packed:
        raise packed_error(found.packed)
    kinds = {_table_kind(file) for file in found.tables}
    kinds |= {"images"} if found.images else set()
    kinds |= {"shards"} if found.shards else set()
    odd = found.others if found.images else [*found.others, *found.texts]
    if not kinds or (odd and not found.images):
        known = ".parquet, .csv, .tsv, .jsonl, .json (COCO), .tar and images"
        raise UserError(f"{odd[0] if odd else path}: unknown kind of file; known are {known}")
    if len(kinds) > 1:
        raise UserError(f"{path}: files of several kinds ({', '.join(sorted(kinds))}); give one kind")
    if found.images:
        asked.refuse(path, "images")
        return ImageFolder(None, found)
    files = _split_of_files(path, files, asked.split)
    if found.shards:
        asked.refuse(path, "shards", split=False)
        return ShardSource(open_index(files))
    asked.refuse(path, "tables", columns=False, split=False)
    return asked.table(files)


def _split_of_files(path: PathLike | Sequence[PathLike], files: list[Path], split: str | None) -> list[Path]:
    """The files of one split among those of a glob. A list of files, and one file, are what is meant."""
    is_glob = isinstance(path, str | os.PathLike) and len(files) > 1
    if is_glob or split is not None:
        root = Path(os.path.commonpath([file.parent for file in files]))
        groups = group_by_split(root, files, least=1 if split else 2)
        if groups or split:
            files = choose_split(path, groups, split, ", or give a narrower glob")
    if is_glob:
        check_parts(files, all_of_them=False)
    return files


def _open_folder(folder: Path, asked: _Asked) -> Source:
    """Shards come first, then images, then tables."""
    if splits := saved_splits(folder):
        chosen = choose_split(folder, {name: [folder / name] for name in splits}, asked.split)
        if len(chosen) > 1:
            raise UserError(f"--split {asked.split}: {folder} was written by save_to_disk: give one split")
        return _open_folder(chosen[0], replace(asked, split=None))
    if is_saved_dataset(folder):
        asked.refuse(folder, "rows", columns=False)
        return DiskSource(folder, asked.image, asked.caption, asked.label, asked.group)
    found = list_folder(folder)
    if found.shards:
        return _open_shards(folder, found, asked)
    if found.images:
        return _open_images(folder, found, asked)
    if found.tables:
        return _open_tables(folder, found, asked)
    if found.packed:
        raise packed_error(found.packed)
    sets = [file for file in found.others if file.suffix.lower() == ".json"]
    named = f"; to read {sets[0]}, give it by name" if sets else ""
    raise UserError(f"{folder}: no images, tables (.parquet, .csv, .tsv, .jsonl) or .tar shards in this folder{named}")


def _open_shards(folder: Path, found: Listing, asked: _Asked) -> Source:
    asked.refuse(folder, "shards", split=False)
    if waiting := not_unpacked(found.packed, found.shards):
        raise packed_error(waiting)
    shards = _one_split(folder, found.shards, asked.split)
    above = {shard.parent for shard in shards}
    if asked.split is None and len(above) > 1:
        if folder not in above:
            raise _several_folders(folder, above, ".tar shards")
        shards = [shard for shard in shards if shard.parent == folder]
        above = {folder}
    every = asked.split is None and {shard for shard in found.shards if shard.parent in above} == set(shards)
    source = ShardSource(open_index(above.pop() if len(above) == 1 and every else shards))
    elsewhere = len(found.shards) - len(shards) if asked.split is None else 0
    more = Counter({".tar in another folder": elsewhere} if elsewhere else {})
    source.left_out = more + Counter(map(unread_reason, [*found.packed, *found.images]))
    return source


def _open_images(folder: Path, found: Listing, asked: _Asked) -> Source:
    level = split_level(folder, found.images, least=1 if asked.split else 2)
    if level is not None:
        names = {image.relative_to(folder).parts[level] for image in found.images}
        if asked.split is None:
            raise several_splits(folder, names)
        found = found.only(folder, level, {*wanted_splits(folder, names, asked.split)})
    elif asked.split is not None:
        asked.refuse(folder, "images")
    metadata = metadata_tables(found)
    if metadata:
        source = asked.table(metadata)
        if source.caption_column or source.label_column:
            asked.refuse(folder, "images", columns=False, split=False)
            source.left_out = count_unnamed(source, found)
            return source
    if any(table.suffix.lower() == ".parquet" for table in found.tables) and not found.texts:
        table = next(table for table in found.tables if table.suffix.lower() == ".parquet")
        raise UserError(f"{folder}: holds images and Parquet tables; give {table}, or a glob of the images")
    asked.refuse(folder, "images", split=False)
    return ImageFolder(folder, found, level)


def _open_tables(folder: Path, found: Listing, asked: _Asked) -> Source:
    asked.refuse(folder, "tables", columns=False, split=False)
    tables = _one_split(folder, found.tables, asked.split)
    above = {table.parent for table in tables}
    if folder in above and asked.split is None:
        tables = [table for table in tables if table.parent == folder]
    elif len(above) > 1 and asked.split is None:
        raise _several_folders(folder, above, "tables")
    kinds = {_table_kind(table) for table in tables}
    if len(kinds) > 1:
        raise UserError(f"{folder}: holds tables of several kinds ({', '.join(sorted(kinds))}); give one by name")
    source = asked.table(tables)
    elsewhere = Counter(map(unread_reason, set(found.tables) - set(tables))) if asked.split is None else Counter()
    source.left_out = elsewhere
    return source


def _one_split(folder: Path, files: list[Path], split: str | None) -> list[Path]:
    groups = group_by_split(folder, files, least=2 if split is None else 1)
    if groups or split:
        files = choose_split(folder, groups, split)
        chosen = {*files}
        check_configurations(
            folder, folder, {name: [one for one in of if one in chosen] for name, of in groups.items()}
        )
    check_parts(files)
    return files


def _several_folders(folder: Path, above: set[Path], what: str) -> UserError:
    names = sorted(str(one.relative_to(folder)) for one in above)
    return UserError(f"{folder}: {what} lie in several folders ({first_few(names)}); give one: {folder / names[0]}")


def _table_kind(file: Path) -> str:
    return TABLES[file.suffix[1:].lower()]

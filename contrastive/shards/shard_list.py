"""Finds the shards of a path, a URL, a glob or a folder."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from contrastive.errors import UserError
from contrastive.shards import storage
from contrastive.shards.listing import is_hidden, not_unpacked, packed_error, unpacker
from contrastive.shards.splits import check_parts, group_by_split

PathLike = str | os.PathLike[str]
Shard = Path | str  # a URL is a string


def find_shards(path: PathLike | Sequence[PathLike]) -> list[Shard]:
    """The shards of a folder, a file name, a URL, a glob or a list of these, sorted by name."""
    if not isinstance(path, str | os.PathLike):
        found: list[Shard] = [shard for part in path for shard in _expand(part)]
    else:
        found = _expand(path)
    for shard in found:
        if isinstance(shard, Path) and unpacker(shard):
            raise packed_error([shard])
        if isinstance(shard, Path) and shard.suffix.lower() != ".tar":
            raise UserError(f"{shard}: not a .tar shard")
        if isinstance(shard, Path) and not shard.exists():
            raise UserError(f"{shard}: no such shard")
    return sorted(found, key=str)


def _expand(path: PathLike) -> list[Shard]:
    if not storage.is_remote(path) and Path(path).is_dir():
        return _in_folder(Path(path)) or [Path(shard) for shard in storage.expand(path)]  # which raises the error
    found: list[Shard] = [shard if storage.is_remote(shard) else Path(shard) for shard in storage.expand(path)]
    files = [shard for shard in found if isinstance(shard, Path)]
    # Braces such as {train,val} name what is meant.
    if len(files) > 1 and not os.path.lexists(path) and glob.has_magic(os.fspath(path)) and "{" not in os.fspath(path):
        root = Path(os.path.commonpath([file.parent for file in files]))
        if splits := group_by_split(root, files):
            raise UserError(
                f"{path}: matches shards of several splits: {', '.join(sorted(splits))}; give a narrower glob, or a "
                "list of globs to read several"
            )
        check_parts(files, all_of_them=False)
    return found


def _in_folder(folder: Path) -> list[Shard]:
    files = sorted(file for file in folder.iterdir() if not is_hidden(file.name))
    shards = [file for file in files if file.suffix.lower() == ".tar"]
    packed = [file for file in files if unpacker(file)]
    if waiting := not_unpacked(packed, shards):
        raise packed_error(waiting)
    if splits := group_by_split(folder, shards):
        some = min(splits)
        pattern = os.path.commonprefix([shard.stem for shard in splits[some]])
        raise UserError(
            f"{folder}: holds shards of several splits: {', '.join(sorted(splits))}; give a glob of one, such as "
            f"'{folder}/{pattern}*.tar'"
        )
    check_parts(shards)
    return list(shards)

"""The splits of a data set by the names of folders and files, as on Hugging Face's Hub."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from contrastive.errors import UserError
from contrastive.wording import first_few

_ALIASES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "minival"),
    "test": ("test", "testing", "eval", "evaluation"),
    "restval": ("restval",),
}
# train-00000-of-00003.parquet
_PART = re.compile(r"(.*?)(\d+)-of-(\d+)(?!\d).*")
_SPLITS = {name: split for split, names in _ALIASES.items() for name in names}


def split_of(name: str) -> str | None:
    """The split that a folder of this name holds: "val" is "validation"; "train2017" is "train"; None for others."""
    return _SPLITS.get(re.sub(r"[-_. ]?\d*$", "", name.lower()))


def split_of_file(stem: str) -> str | None:
    """The split that a file of this name holds, by its first or its last word: train-00000-of-00002, pairs_val."""
    words = [word for word in re.split(r"[-_. ]+", stem.lower()) if word]
    return next((found for word in words[:1] + words[-1:] if (found := split_of(word))), None)


def split_level(root: Path, files: Sequence[Path], least: int = 2) -> int | None:
    """The level of folders below `root` that are splits, at least so many; 0 for the first level, None where none is.

    All folders of the level must be named like a split: train, test and bus are classes.
    """
    parents = [file.relative_to(root).parts[:-1] for file in files]
    for level in range(min(map(len, parents), default=0)):
        names = {parts[level] for parts in parents}
        if all(map(split_of, names)) and len({split_of(name) for name in names}) >= least:
            return level
    return None


def group_by_split(root: Path, files: Sequence[Path], least: int = 2) -> dict[str, list[Path]]:
    """The files of each split, by the name that the folder uses; {} where it has fewer than `least` splits.

    The names of files decide where no folders are splits. Files that name no split are in none.
    """
    level = split_level(root, files, least)
    if level is not None:
        return _grouped(files, [file.relative_to(root).parts[level] for file in files])
    stems = [split_of_file(file.stem) for file in files]
    return _grouped(files, stems) if len({*stems} - {None}) >= least else {}


def choose_split(path: object, found: Mapping[str, Sequence[Path]], split: str | None, remedy: str = "") -> list[Path]:
    """The files of the wanted split, or of several that "+" joins.

    remedy: another one besides --split, for the error.

    Raises UserError: no split is wanted where there are several, there is none of that name.
    """
    if split is None:
        raise several_splits(path, found, remedy)
    return [file for name in wanted_splits(path, found, split) for file in found[name]]


def several_splits(path: object, found: Iterable[str], remedy: str = "") -> UserError:
    """The error for a set of several splits when none was chosen."""
    names = _in_order(found)
    return UserError(f"{path}: holds several splits: {', '.join(names)}; choose one, as in --split {names[0]}{remedy}")


def check_configurations(path: object, root: Path, found: Mapping[str, Sequence[Path]]) -> None:
    """Raise UserError where the files of one split come from several folders: en/train-0.parquet, de/train-0.parquet.

    Folders below the folder of a split are parts of it.
    """
    level = split_level(root, [file for files in found.values() for file in files], least=1)
    for split, files in found.items():
        folders = {file.relative_to(root).parts[:-1][:level] for file in files}
        if len(folders) > 1:
            names = sorted("/".join(parts) or "." for parts in folders)
            raise UserError(
                f"{path}: the split {split} lies in several folders ({first_few(names)}), which may be different sets; "
                f"give one: {root / names[0]}"
            )


def check_parts(files: Iterable[Path], *, all_of_them: bool = True) -> None:
    """Raise UserError for a part of NAME-00001-of-00003 that is missing; the other parts of its set are given.

    all_of_them: also for parts before the first one and after the last one that is given.
    """
    sets: dict[tuple[Path, str, str, str], dict[int, Path]] = {}
    for file in files:
        if found := _PART.fullmatch(file.name):
            sets.setdefault((file.parent, found[1], found[3], file.suffix), {})[int(found[2])] = file
    for (_, before, count, _), parts in sets.items():
        first, last = (1, int(count)) if int(count) in parts and 0 not in parts else (0, int(count) - 1)
        if not all_of_them:
            first, last = min(parts), max(parts)
        missing = next((number for number in range(first, last + 1) if number not in parts), None)
        if missing is None:
            continue
        one = next(iter(parts.values()))
        digits = _PART.fullmatch(one.name)[2]  # type: ignore[index]
        name = f"{before}{missing:0{len(digits)}d}{one.name[len(before) + len(digits) :]}"
        if not all_of_them and one.with_name(name).exists():
            continue  # the glob leaves it out
        some = ", or give a glob of the parts to read" if all_of_them else ""
        lacking = last - first + 1 - len(parts)
        more = f" and {lacking - 1:,} more" if lacking > 1 else ""
        raise UserError(f"{one.with_name(name)}: this file{more} of {count} is missing; copy or download it{some}")


def wanted_splits(path: object, found: Iterable[str], split: str) -> list[str]:
    """The names in `found` that `split` selects: by name, or by another name of the same split (val, validation)."""
    names = _in_order(found)
    if not names:
        raise UserError(f"--split {split}: {path} holds no splits; leave it out")
    wanted: list[str] = []
    for part in split.split("+"):
        same = [name for name in names if name == part.strip()]
        same = same or [
            name for name in names if split_of(name) is not None and split_of(name) == split_of(part.strip())
        ]
        if not same:
            raise UserError(f"--split {split}: {path} holds {', '.join(names)}")
        wanted += (name for name in same if name not in wanted)
    return wanted


def _in_order(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: (list(_ALIASES).index(split_of(name) or "restval"), name))


def _grouped(files: Sequence[Path], names: Sequence[str | None]) -> dict[str, list[Path]]:
    groups: dict[str, list[Path]] = {}
    for file, name in zip(files, names, strict=True):
        if name is not None:
            groups.setdefault(name, []).append(file)
    return groups

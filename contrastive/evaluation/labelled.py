"""A labelled set: images with class names, from any source that has them."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

from contrastive.errors import UserError
from contrastive.evaluation.items import Images
from contrastive.shards import Source, open_source


def open_labelled(path: Images, *, label: str | None = None, limit: int | None = None) -> Any:
    """Open a set and make sure that its first image has a label.

    path: as `contrastive.shards.open_source`; an open `Source` is passed through. label: the column, guessed
    if None.

    Raises UserError when the source has no labels; the columns found are listed.
    """
    if isinstance(path, (str, PathLike)):
        source: Any = open_source(path, label=label, limit=limit)
    else:
        source = path
    first = next(iter(source), None)
    if first is None:
        raise UserError(f"{path}: there is nothing in it")
    if getattr(first, "label", None) is None and getattr(source, "labelled", False):
        raise UserError(f"{path}: {first.key} is outside the class folders and has no label; move it into one, or away")
    if getattr(first, "label", None) is None:
        columns = source.columns if isinstance(source, Source) else []
        remedy = (
            f"name one with --label; columns found: {', '.join(columns)}"
            if columns
            else ("use a table with a label column, or one sub-folder a class")
        )
        raise UserError(f"{path}: the images have no labels; {remedy}")
    return source


def check_complete(name: str, labels: Sequence[str | None], keys: Sequence[str]) -> list[str]:
    """The labels, none of them missing; else `UserError` with the first key that has none."""
    missing = [key for key, label in zip(keys, labels, strict=True) if label is None]
    if missing:
        raise no_label(name, missing)
    return [str(label) for label in labels]


def no_label(name: str, keys: Sequence[str]) -> UserError:
    """The error for images without a label. keys: of these images, at least one."""
    return UserError(f"{name}: {len(keys):,} images have no label, the first is {keys[0]}; give every image one")


def has_captions(path: Images) -> bool:
    """Whether the first image of a source has a caption."""
    source: Any = open_source(path) if isinstance(path, (str, PathLike)) else path
    return bool(getattr(next(iter(source), None), "captions", ()))

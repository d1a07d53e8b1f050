"""A labelled set: images with class names, from any source that has them."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

from contrastive.errors import UserError
from contrastive.evaluation.items import Images
from contrastive.printable import printable
from contrastive.shards import Source, open_source

OUTSIDE = "is outside the class folders and has no label; move it into a class folder, or remove it"


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
        raise UserError(f"{path}: {first.key} {OUTSIDE}")
    if getattr(first, "label", None) is None and getattr(source, "label_column", None) is not None:
        raise UserError(f"{path}: {_place(source, first.key)} has no label; {_remedy(source)}")
    if getattr(first, "label", None) is None:
        columns = source.columns if isinstance(source, Source) else []
        remedy = (
            f"name one with --label; columns found: {', '.join(columns)}"
            if columns
            else ("use a table with a label column, or one sub-folder a class")
        )
        raise UserError(f"{path}: the images have no labels; {remedy}")
    return source


def check_labels_given(name: str, labels: Sequence[str | None], keys: Sequence[str], source: Any) -> list[str]:
    """The labels, none of them missing, and not numbers with fractions in a column of a table.

    Args:
        name: of the set, for errors.
        keys: of the images with these labels.
        source: what they were read from.

    Raises UserError: the place of the first image without a label, or the column with fractions.
    """
    missing = [key for key, label in zip(keys, labels, strict=True) if label is None]
    if missing:
        raise no_label(name, missing, source)
    given = [str(label) for label in labels]
    column = getattr(source, "label_column", None)
    fraction = _fraction(set(given)) if column is not None else None
    if fraction is not None:
        raise UserError(
            f"{name}: column '{column}' holds numbers with fractions, such as {fraction}; labels are names or whole "
            "numbers: name another column"
        )
    return given


def no_label(name: str, keys: Sequence[str], source: Any = None) -> UserError:
    """The error for images without a label.

    Args:
        name: of the set.
        keys: of these images, at least one.
        source: what they were read from; it is read again up to the first of them.
    """
    count = f"{len(keys):,} images have no label, the first is" if len(keys) > 1 else "1 image has no label:"
    return UserError(f"{name}: {count} {_place(source, keys[0])}; {_remedy(source)}")


def _place(source: Any, key: str) -> str:
    """The file and line or row of an image, and its path, where the source has them; else its key."""
    records = source if isinstance(source, Source) else ()
    record = next((one for one in records if printable(one.key) == key or one.key == key), None)
    if record is None or record.place is None:
        return key
    name = record.name or record.key
    return printable(record.place if name == record.place else f"{record.place} ({name})")


def _remedy(source: Any) -> str:
    column = getattr(source, "label_column", None)
    if column is not None:
        return f"its cell in column '{column}' is empty, null, NaN or None: fill it, or remove the row"
    return "move it into a class folder, or remove it" if getattr(source, "labelled", False) else "give every image one"


def _fraction(labels: set[str]) -> str | None:
    """A label with a fraction where all labels are numbers."""
    try:
        numbers = {label: float(label) for label in sorted(labels)}
    except ValueError:
        return None
    return next((label for label, number in numbers.items() if not number.is_integer()), None)


def has_captions(path: Images) -> bool:
    """Whether the first image of a source has a caption."""
    source: Any = open_source(path) if isinstance(path, (str, PathLike)) else path
    return bool(getattr(next(iter(source), None), "captions", ()))

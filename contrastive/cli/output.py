"""Rows of results as a table, CSV or JSON, on standard output or in a file; shared by the commands."""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from contrastive.errors import UserError
from contrastive.wording import counted, one_line

NAME_BYTES = 255  # of one part of a path, on every usual file system


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """`--format` and `--output`."""
    parser.add_argument("--format", choices=("table", "csv", "json"), default="table", help="default: table")
    parser.add_argument("--output", metavar="FILE", help="write to this file instead of the screen")


def add_image_arguments(parser: argparse.ArgumentParser) -> None:
    """The images of `classify` and `probe predict`."""
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="files, folders, a pattern, a table or shards")
    add_split_argument(parser)
    parser.add_argument("--invert", action="store_true", help="turn the images into their negatives first")
    parser.add_argument("--top-k", type=int, default=5, metavar="K", help="labels an image (default: 5)")


def add_split_argument(parser: argparse.ArgumentParser, option: str = "--split", of: str = "the images") -> None:
    """`--split`, and the like of it for a second set."""
    parser.add_argument(option, metavar="NAME", help=f"of {of}: the split to read where a folder holds several")


def check_output(option: str, path: str | None, *, makes_folders: bool = False) -> None:
    """Raises `UserError` where a file cannot be written, before any work is done. None passes.

    makes_folders: folders that are missing are made with the file.
    """
    if path is None:
        return
    _check_names(option, path)
    file = Path(path)
    if file.is_dir():
        raise UserError(f"{option} {path}: is a folder; name a file in it")
    if not makes_folders and not file.parent.exists():
        raise UserError(f"{option} {path}: there is no folder {file.parent}; make it first")
    if file.exists() and not os.access(file, os.W_OK):
        raise UserError(f"{option} {path}: no permission to write there")
    if file.exists() and not makes_folders:  # it is written in place, such as /dev/stdout
        return
    _check_folder(option, path, file.parent, f"is a file, not a folder; name a file in a folder, not {file.name} in it")


def check_output_folder(option: str, path: str | None) -> None:
    """As `check_output`, for a folder that is made where it is missing."""
    if path is not None:
        _check_names(option, path)
        _check_folder(option, path, Path(path), "is a file; name a folder")


def _check_names(option: str, path: str) -> None:
    longest = max((len(os.fsencode(part)) for part in Path(path).parts), default=0)
    if longest > NAME_BYTES:
        raise UserError(f"{option} {path[:60]}…: a name of {longest:,} bytes is too long; give a shorter one")


def _check_folder(option: str, path: str, folder: Path, of_file: str) -> None:
    """Raises `UserError` where `folder` cannot be made or takes no file, found by trying; leaves nothing there.

    Permissions alone do not show it: a read-only or a special file system (/proc) refuses the superuser too.
    """
    nearest = folder.absolute()
    while not os.path.lexists(nearest) and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        what = of_file if nearest.exists() else "is a link to nothing; remove it or name another folder"
        raise UserError(f"{option} {path}: {nearest} {what}")
    try:
        with tempfile.TemporaryDirectory(prefix=".contrastive-", dir=nearest):
            pass
    except PermissionError:
        raise UserError(f"{option} {path}: no permission to write in {nearest}; name another folder") from None
    except OSError as fault:
        why = fault.strerror or one_line(fault)
        raise UserError(f"{option} {path}: nothing can be written in {nearest} ({why}); name another folder") from None


def write_rows(rows: Sequence[Mapping[str, Any]], style: str, output: str | None = None) -> None:
    """Print rows that share their columns. style: "table", "csv" or "json" (numbers unrounded)."""
    text = {"table": _table, "csv": _csv, "json": _json}[style](rows)
    if output is None:
        sys.stdout.write(text)
    else:
        Path(output).write_text(text, encoding="utf-8", errors="backslashreplace")


def guess_rows(outcomes: Sequence[Any], probabilities: Any, classes: Sequence[Any], top_k: int) -> list[dict[str, Any]]:
    """One row an image and label, the `top_k` likeliest of each image; see `rows_in_order`."""

    def of_image(row: int) -> list[dict[str, Any]]:
        chances = probabilities[row]
        order = (-chances).argsort(kind="stable")[:top_k]
        return [
            {"rank": rank, "label": str(classes[best]), "probability": float(chances[best])}
            for rank, best in enumerate(order, start=1)
        ]

    return rows_in_order(outcomes, of_image, "probability")


def rows_in_order(
    outcomes: Sequence[Any], of_image: Callable[[int], list[dict[str, Any]]], value: str
) -> list[dict[str, Any]]:
    """Rows in the order of the input, each image that could not be read with a row for its error.

    outcomes: see `Embeddings.outcomes`. of_image: rows of the n-th image that was read, without image and error; none
    gives an empty row. value: the name of their number.
    """
    rows: list[dict[str, Any]] = []
    read = 0
    blank = {"rank": None, "label": None, value: None}
    for outcome in outcomes:
        own = [blank]
        if outcome.reason is None:
            own, read = of_image(read) or own, read + 1
        rows += [{"image": outcome.name, **one, "error": outcome.fault} for one in own]
    return rows


def print_left_out(source: Any, outcomes: Sequence[Any], what: str = "", *, captions: bool = False) -> None:
    """Print the images that were not read, on stderr: the remarks of the source, and one line with all reasons.

    captions: also the remarks that concern captions alone.
    """
    from contrastive.evaluation.remarks import source_remarks

    for line in source_remarks(source, captions=captions):
        print(f"{what}{line}", file=sys.stderr)
    failures = [outcome for outcome in outcomes if outcome.reason is not None]
    if failures:
        first = {outcome.reason: outcome for outcome in reversed(failures)}
        counts = Counter(outcome.reason for outcome in failures).most_common()
        reasons = ", ".join(
            f"{count:,} × {reason} ({'first ' if count > 1 else ''}{first[reason].name}"
            f"{': ' + first[reason].detail if first[reason].detail else ''})"
            for reason, count in counts
        )
        print(f"{what}not read: {len(failures):,} of {counted(len(outcomes), 'image')}: {reasons}", file=sys.stderr)


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    columns = [name for name in rows[0] if any(row[name] not in ("", None) for row in rows)]
    cells = [[_cell(row[name]) for name in columns] for row in rows]
    widths = [max(len(name), *(len(line[i]) for line in cells)) for i, name in enumerate(columns)]
    numeric = [all(isinstance(row[name], (int, float, type(None))) for row in rows) for name in columns]
    lines = [columns, *cells]
    return "".join(
        "  ".join(
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        + "\n"
        for line in lines
    )


def _cell(value: Any) -> str:
    if isinstance(value, str) and not value.isprintable():  # a line break would end the row
        return "".join(mark if mark.isprintable() else ascii(mark)[1:-1] for mark in value)
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _json(rows: Sequence[Mapping[str, Any]]) -> str:
    return json.dumps(list(rows), indent=2, ensure_ascii=False) + "\n"

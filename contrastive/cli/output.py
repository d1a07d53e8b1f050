"""Rows of results as a table, CSV or JSON, on standard output or in a file; shared by the commands."""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """`--format` and `--output`."""
    parser.add_argument("--format", choices=("table", "csv", "json"), default="table", help="default: table")
    parser.add_argument("--output", metavar="FILE", help="write to this file instead of the screen")


def add_image_arguments(parser: argparse.ArgumentParser) -> None:
    """The images of `classify` and `probe predict`."""
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="files, a folder, a glob, a table or shards")
    parser.add_argument("--invert", action="store_true", help="turn the images into their negatives first")
    parser.add_argument("--top-k", type=int, default=5, metavar="K", help="labels an image (default: 5)")


def write_rows(rows: Sequence[Mapping[str, Any]], style: str, output: str | None = None) -> None:
    """Print rows that share their columns. style: "table", "csv" or "json" (numbers unrounded)."""
    text = {"table": _table, "csv": _csv, "json": _json}[style](rows)
    if output is None:
        sys.stdout.write(text)
    else:
        Path(output).write_text(text, encoding="utf-8")


def guess_rows(
    keys: Sequence[str], probabilities: Any, classes: Sequence[Any], top_k: int, failures: Mapping[str, str]
) -> list[dict[str, Any]]:
    """One row an image and label: the `top_k` likeliest of each, then the images that could not be read."""
    rows: list[dict[str, Any]] = []
    for key, chances in zip(keys, probabilities, strict=True):
        for rank, best in enumerate((-chances).argsort()[:top_k], start=1):
            chance = float(chances[best])
            rows.append({"image": key, "rank": rank, "label": str(classes[best]), "probability": chance, "error": ""})
    for key, reason in failures.items():
        rows.append({"image": key, "rank": None, "label": None, "probability": None, "error": reason})
        print(f"{key}: {reason}", file=sys.stderr)
    return rows


def one_source(images: Sequence[str]) -> Any:
    """The images named on a command line, as `embed` takes them: one name is a source, several are files."""
    return images[0] if len(images) == 1 else list(images)


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
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _json(rows: Sequence[Mapping[str, Any]]) -> str:
    return json.dumps(list(rows), indent=2, ensure_ascii=False) + "\n"

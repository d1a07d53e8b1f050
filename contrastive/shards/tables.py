"""Tables of pairs: Parquet, CSV/TSV and JSON lines."""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from contrastive.errors import UserError
from contrastive.shards.files import read_regular
from contrastive.shards.record import Part, Record, Segment, Source

IMAGE_NAMES = (
    "image",
    "img",
    "image_path",
    "filepath",
    "file_path",
    "filename",
    "file_name",
    "file",
    "path",
    "jpg",
)
CAPTION_NAMES = (
    "caption",
    "text",
    "title",
    "description",
    "alt_text",
    "alt",
    "sentence",
    "captions",
)
ROW_LINES = 200  # of a row of a CSV file, at most; captions may have line breaks
LABEL_NAMES = ("label_name", "label", "class_name", "class", "category")


class TableSource(Source):
    """Rows of one or several files with the same columns.

    allow_outside: read images by paths that leave the table's folder.
    """

    allow_outside = True

    def __init__(
        self,
        files: list[Path],
        image: str | None,
        caption: str | None,
        label: str | None,
    ) -> None:
        self.files = files
        self.columns = self._read_columns()
        self.image_column = self._find("image", image, IMAGE_NAMES)
        self.caption_column = self._find("caption", caption, CAPTION_NAMES)
        self.label_column = self._find("label", label, LABEL_NAMES)

    def _read_columns(self) -> list[str]:
        raise NotImplementedError

    def _rows(self, segment: Segment) -> Iterator[Mapping[str, Any]]:
        """The rows of a segment: fewer where the file ends before."""
        raise NotImplementedError

    def _count(self) -> int:
        return sum(sum(1 for _ in starts) for starts in self._row_starts())

    def read(self, part: Part) -> Iterator[Record]:
        number = part.row
        for segment in part.segments:
            for row in self._rows(segment):
                yield self._record(number, self.files[segment.file], row)
                number += 1

    def identity(self) -> dict[str, Any]:
        columns = [self.image_column, self.caption_column, self.label_column]
        return {**super().identity(), "columns": columns, "allow_outside": self.allow_outside}

    def _find(self, role: str, named: str | None, guesses: tuple[str, ...]) -> str | None:
        found = ", ".join(self.columns)
        if named is not None:
            if named not in self.columns:
                raise UserError(f"{self.files[0]}: no column '{named}' for the {role}; columns: {found}")
            return named
        lowered = {column.lower(): column for column in reversed(self.columns)}
        match = next((lowered[guess] for guess in guesses if guess in lowered), None)
        if match is None and role == "image":
            raise UserError(f"{self.files[0]}: no column looks like the image; name one of: {found}")
        return match

    def _records(self) -> Iterator[Record]:
        whole = tuple(Segment(file, 0, sys.maxsize) for file in range(len(self.files)))
        return self.read(Part(0, 0, whole))

    def _record(self, number: int, file: Path, row: Mapping[str, Any]) -> Record:
        label = row.get(self.label_column) if self.label_column else None
        key = row.get("key")
        image, fault = _image(file, row.get(str(self.image_column)), self.allow_outside)
        return Record(
            key=f"{number:09d}" if key in (None, "") else str(key),
            image=image,
            captions=self._captions(row),
            label=None if label in (None, "") else str(label),
            meta=self._meta(row),
            fault=fault,
        )

    def _captions(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        values: list[Any] = []
        for column in (self.caption_column, "captions"):
            value = row.get(column) if column else None
            values += value if isinstance(value, list) else [value]
        texts = [value.strip() for value in values if isinstance(value, str) and value.strip()]
        return tuple(dict.fromkeys(texts))  # without repetitions, in order

    def _meta(self, row: Mapping[str, Any]) -> dict[str, Any]:
        used = {
            "key",
            "captions",
            "label",
            self.image_column,
            self.caption_column,
            self.label_column,
        }
        plain = {k: v for k, v in row.items() if k not in used and isinstance(v, str | int | float)}
        return {k: v for k, v in plain.items() if not (isinstance(v, float) and not math.isfinite(v))}


class ParquetSource(TableSource):
    """Parquet files, read in batches of rows."""

    kind = "parquet"

    def _read_columns(self) -> list[str]:
        import pyarrow

        try:
            return list(self._open(self.files[0]).schema_arrow.names)
        except (pyarrow.ArrowInvalid, OSError) as fault:
            raise UserError(f"{self.files[0]}: not a Parquet file ({_one_line(fault)})") from None

    def _open(self, file: Path) -> Any:
        import pyarrow.parquet

        return pyarrow.parquet.ParquetFile(file)

    def _row_starts(self) -> Iterator[Iterable[int]]:
        for file in self.files:
            yield range(self._open(file).metadata.num_rows)

    def _rows(self, segment: Segment) -> Iterator[Mapping[str, Any]]:
        table = self._open(self.files[segment.file])
        first = 0
        for group in range(table.num_row_groups):
            last = first + table.metadata.row_group(group).num_rows
            if first < segment.at + segment.rows and last > segment.at:
                yield from rows_between(table.iter_batches(batch_size=256, row_groups=[group]), segment, first)
            first = last


class CsvSource(TableSource):
    """CSV or TSV with a header line; the separator is the one that divides the header into most columns."""

    kind = "csv"

    def _read_columns(self) -> list[str]:
        header = next(Lines(self.files[0]), "")
        if not header.strip():
            raise UserError(f"{self.files[0]}: empty; the first line must name the columns")
        self.separator = max("\t,;|", key=lambda mark: len(next(csv.reader([header], delimiter=mark))))
        return [name.strip() for name in next(csv.reader([header], delimiter=self.separator))]

    def _row_starts(self) -> Iterator[Iterable[int]]:
        return (self._starts(file) for file in self.files)

    def _starts(self, file: Path) -> Iterator[int]:
        lines = Lines(file)
        before = 0
        for number, row in enumerate(self._split(lines)):
            if row and number:
                yield before
            before = lines.at

    def _rows(self, segment: Segment) -> Iterator[Mapping[str, Any]]:
        rows = self._split(Lines(self.files[segment.file], segment.at))
        if not segment.at:
            next(rows, None)  # the header
        for row in itertools.islice(filter(None, rows), segment.rows):
            yield dict(zip(self.columns, row, strict=False))

    def _split(self, lines: Lines) -> Iterator[list[str]]:
        csv.field_size_limit(1 << 24)  # the default of 128 KiB is a limit on captions
        raw: list[str] = []  # the lines of one row

        def noted() -> Iterator[str]:
            for line in lines:
                raw.append(line)
                yield line

        begins = lines.at
        try:
            for row in csv.reader(noted(), delimiter=self.separator):
                # a quote that is never closed makes one caption of all rows up to the next one, or to the end
                if len(raw) > ROW_LINES or (len(raw) > 1 and "".join(raw).count('"') % 2):
                    raise UserError(
                        f"{lines.path}: the row from byte {begins:,} on goes over {len(raw):,} lines: a quote is not "
                        "closed; close it, or double the quotes that belong to the text"
                    )
                yield row
                raw.clear()
                begins = lines.at
        except csv.Error as fault:
            raise UserError(f"{lines.path}: not readable as CSV near byte {lines.at:,} ({_one_line(fault)})") from None


class JsonLinesSource(TableSource):
    """One JSON object a line; the columns are those of the first line."""

    kind = "jsonl"

    def _read_columns(self) -> list[str]:
        first = next(self._rows(Segment(0, 0, 1)), None)
        if first is None:
            raise UserError(f"{self.files[0]}: empty; give one JSON object a line")
        return list(first)

    def _row_starts(self) -> Iterator[Iterable[int]]:
        return (self._starts(file) for file in self.files)

    def _starts(self, file: Path) -> Iterator[int]:
        lines = Lines(file)
        before = 0
        for line in lines:
            if line.strip():
                yield before
            before = lines.at

    def _rows(self, segment: Segment) -> Iterator[Mapping[str, Any]]:
        lines = Lines(self.files[segment.file], segment.at)
        for line in itertools.islice((line for line in lines if line.strip()), segment.rows):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as fault:
                what = "nested too deeply" if isinstance(fault, RecursionError) else _one_line(fault)
                what = "a number of too many digits" if "set_int_max_str_digits" in what else what
                raise UserError(f"{lines}is not JSON ({what})") from None
            if not isinstance(row, dict):
                raise UserError(f"{lines}is not a JSON object")
            yield row


class Lines:
    """The lines of a UTF-8 file from a byte offset on; `at` is the offset behind the last one given."""

    def __init__(self, path: Path, at: int = 0) -> None:
        self.path, self.at = path, at
        self._file = open(path, "rb")
        self._file.seek(at)
        self._waiting: list[bytes] = []

    def __iter__(self) -> Lines:
        return self

    def __next__(self) -> str:
        if not self._waiting:
            line = b"" if self._file.closed else self._file.readline()
            if not line:
                self._file.close()
                raise StopIteration
            # a carriage return alone ends a line too, as in Python's text files
            self._waiting = [piece for piece in re.split(rb"(?<=\r)(?!\n)", line) if piece][::-1]
        piece = self._waiting.pop()
        encoding = "utf-8" if self.at else "utf-8-sig"
        self.at += len(piece)
        try:
            return piece.decode(encoding)
        except UnicodeDecodeError:
            raise UserError(f"{self.path}: not UTF-8; save it as UTF-8") from None

    def __str__(self) -> str:
        """Where the last line lies, to begin a message with."""
        with open(self.path, "rb") as file:
            number = len(file.read(self.at).splitlines())
        return f"{self.path}: line {number} "


def rows_between(batches: Iterable[Any], segment: Segment, first: int = 0) -> Iterator[Mapping[str, Any]]:
    """The rows of a segment from Arrow batches, the first of which begins at row `first` of the file."""
    for batch in batches:
        start = max(segment.at - first, 0)
        stop = min(segment.at + segment.rows - first, batch.num_rows)
        if stop <= 0:
            return
        if start < stop:
            yield from batch.slice(start, stop - start).to_pylist()
        first += batch.num_rows


def _image(table: Path, value: Any, allow_outside: bool) -> tuple[bytes | None, str | None]:
    """The bytes (None where there are none or the file is missing), and why they were not read.

    A path is relative to the table's folder.
    """
    if isinstance(value, dict):  # as the `datasets` library stores images
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value, None
    if not isinstance(value, str) or not value.strip():
        return None, None
    folder = os.path.realpath(table.parent)
    try:
        path = os.path.realpath(os.path.join(folder, value.strip()))
        if not allow_outside and os.path.commonpath([folder, path]) != folder:
            return None, "path outside the table's folder"
        return read_regular(Path(path))
    except (OSError, ValueError):
        return None, None


def _one_line(fault: Exception) -> str:
    return str(fault).split("\n")[0]

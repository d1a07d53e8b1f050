"""Tables of pairs: Parquet, CSV/TSV and JSON lines."""

import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from contrastive.errors import UserError
from contrastive.shards.record import Record, Source

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
LABEL_NAMES = ("label_name", "label", "class_name", "class", "category")


class TableSource(Source):
    """Rows of one or several files with the same columns."""

    def __init__(
        self,
        files: list[Path],
        image: str | None,
        caption: str | None,
        label: str | None,
    ) -> None:
        self.files = files
        try:
            self.columns = self._read_columns()
        except UnicodeDecodeError:
            raise UserError(f"{self.files[0]}: not UTF-8; save it as UTF-8") from None
        self.image_column = self._find("image", image, IMAGE_NAMES)
        self.caption_column = self._find("caption", caption, CAPTION_NAMES)
        self.label_column = self._find("label", label, LABEL_NAMES)

    def _read_columns(self) -> list[str]:
        raise NotImplementedError

    def _rows(self) -> Iterator[tuple[Path, Mapping[str, Any]]]:
        raise NotImplementedError

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
        for number, (file, row) in enumerate(self._rows()):
            label = row.get(self.label_column) if self.label_column else None
            key = row.get("key")
            yield Record(
                key=f"{number:09d}" if key in (None, "") else str(key),
                image=_image(file, row.get(str(self.image_column))),
                captions=self._captions(row),
                label=None if label in (None, "") else str(label),
                meta=self._meta(row),
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

    def _count(self) -> int:
        return sum(self._open(file).metadata.num_rows for file in self.files)

    def _rows(self) -> Iterator[tuple[Path, Mapping[str, Any]]]:
        for file in self.files:
            for batch in self._open(file).iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    yield file, row


class CsvSource(TableSource):
    """CSV or TSV with a header line; the separator is the one that divides the header into most columns."""

    kind = "csv"

    def _read_columns(self) -> list[str]:
        csv.field_size_limit(1 << 24)  # the default of 128 KiB is a limit on captions
        with self._open(self.files[0]) as file:
            header = file.readline()
        if not header.strip():
            raise UserError(f"{self.files[0]}: empty; the first line must name the columns")
        self.separator = max("\t,;|", key=lambda mark: len(next(csv.reader([header], delimiter=mark))))
        return [name.strip() for name in next(csv.reader([header], delimiter=self.separator))]

    def _open(self, file: Path) -> Any:
        return open(file, encoding="utf-8-sig", newline="")

    def _count(self) -> int:
        return sum(1 for _ in self._rows())

    def _rows(self) -> Iterator[tuple[Path, Mapping[str, Any]]]:
        for path in self.files:
            try:
                with self._open(path) as file:
                    rows = csv.reader(file, delimiter=self.separator)
                    next(rows, None)
                    for row in rows:
                        if row:
                            yield path, dict(zip(self.columns, row, strict=False))
            except UnicodeDecodeError:
                raise UserError(f"{path}: not UTF-8; save it as UTF-8") from None


class JsonLinesSource(TableSource):
    """One JSON object a line; the columns are those of the first line."""

    kind = "jsonl"

    def _read_columns(self) -> list[str]:
        first = next(self._rows(), None)
        if first is None:
            raise UserError(f"{self.files[0]}: empty; give one JSON object a line")
        return list(first[1])

    def _count(self) -> int:
        return sum(1 for _ in self._rows())

    def _rows(self) -> Iterator[tuple[Path, Mapping[str, Any]]]:
        for path in self.files:
            with open(path, encoding="utf-8-sig") as file:
                for number, line in enumerate(_utf8_lines(file, path), 1):
                    if not line.strip():
                        continue
                    try:
                        row = json.loads(line)
                    except ValueError as fault:
                        raise UserError(f"{path}: line {number} is not JSON ({_one_line(fault)})") from None
                    if not isinstance(row, dict):
                        raise UserError(f"{path}: line {number} is not a JSON object")
                    yield path, row


def _image(table: Path, value: Any) -> bytes | None:
    """Bytes as they are; a path is relative to the table. None where there is none or the file is missing."""
    if isinstance(value, dict):  # as the `datasets` library stores images
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value.strip():
        return None
    try:
        return (table.parent / value.strip()).read_bytes()
    except (OSError, ValueError):
        return None


def _one_line(fault: Exception) -> str:
    return str(fault).split("\n")[0]


def _utf8_lines(file: Iterable[str], path: Path) -> Iterator[str]:
    try:
        yield from file
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8; save it as UTF-8") from None

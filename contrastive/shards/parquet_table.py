"""Parquet files, and what they share with other Arrow data: batches of rows, and the names of classes."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from contrastive.errors import UserError
from contrastive.shards.record import Segment
from contrastive.shards.tables import Row, TableSource
from contrastive.wording import one_line


class ArrowSource(TableSource):
    """Files with an Arrow schema, where the length of each is known without reading its rows."""

    def _schema(self, file: int) -> Any:
        raise NotImplementedError

    def _length(self, file: int) -> int:
        raise NotImplementedError

    def _features(self, file: int) -> Mapping[str, Any]:
        """The features of Hugging Face's `datasets`, by column; empty where the file has none."""
        raise NotImplementedError

    def _read_columns(self, file: int) -> list[str]:
        names = list(self._schema(file).names)
        twice = next((name for name, count in Counter(names).items() if count > 1), None)
        if twice is not None:
            raise UserError(f"{self.files[file]}: two columns are named '{twice}'; rename one of them")
        return names

    def _class_names(self, file: int) -> Mapping[str, list[str]]:
        cached = self.__dict__.setdefault("_names", {})
        if file not in cached:
            cached[file] = {
                column: list(map(str, feature["names"]))
                for column, feature in self._features(file).items()
                if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names")
            }
        return cached[file]

    def _has_paths(self) -> bool:
        import pyarrow.types as types

        def is_text(kind: Any) -> bool:
            kind = kind.value_type if types.is_dictionary(kind) else kind
            return types.is_string(kind) or types.is_large_string(kind)

        return all(is_text(self._schema(file).field(self.image_column).type) for file in range(len(self.files)))

    def _places(self, file: int, note: Callable[[Mapping[str, Any]], None] | None) -> tuple[Any, Any]:
        if note is not None:
            for _, row in self._rows(Segment(file, 0, sys.maxsize), self._text_columns()):
                note(row)
        return range(self._length(file)), range(0)


class ParquetSource(ArrowSource):
    """Parquet files, read in batches of rows."""

    kind = "parquet"

    def _schema(self, file: int) -> Any:
        cached = self.__dict__.setdefault("_schemas", {})
        if file not in cached:
            cached[file] = self._open(self.files[file]).schema_arrow
        return cached[file]

    def _length(self, file: int) -> int:
        return self._open(self.files[file]).metadata.num_rows

    def _open(self, file: Path) -> Any:
        import pyarrow
        import pyarrow.parquet

        try:
            return pyarrow.parquet.ParquetFile(file)
        except (pyarrow.ArrowInvalid, OSError) as fault:
            raise UserError(f"{file}: not a Parquet file ({one_line(fault)})") from None

    def _features(self, file: int) -> Mapping[str, Any]:
        # written by `datasets` and the Hugging Face hub: {"info": {"features": {…}}}
        text = (self._schema(file).metadata or {}).get(b"huggingface", b"{}")
        try:
            features = json.loads(text)["info"]["features"]
        except (ValueError, KeyError, TypeError):
            return {}
        return features if isinstance(features, dict) else {}

    def _rows(self, segment: Segment, columns: Sequence[str] | None = None) -> Iterator[Row]:
        import pyarrow

        file = self.files[segment.file]
        table = self._open(file)
        if columns is not None:
            columns = [column for column in columns if column in self.headers[segment.file]]
        first = 0
        try:
            for group in range(table.num_row_groups):
                last = first + table.metadata.row_group(group).num_rows
                if first < segment.at + segment.rows and last > segment.at:
                    batches = table.iter_batches(batch_size=256, row_groups=[group], columns=columns)
                    yield from rows_between(batches, segment, first)
                first = last
        except (pyarrow.ArrowException, OSError) as fault:
            raise UserError(f"{file}: cannot be read as Parquet ({one_line(fault)}); copy or write it again") from None


def rows_between(batches: Iterable[Any], segment: Segment, first: int = 0) -> Iterator[Row]:
    """The rows of a segment from Arrow batches, the first of which begins at row `first` of the file."""
    for batch in batches:
        start = max(segment.at - first, 0)
        stop = min(segment.at + segment.rows - first, batch.num_rows)
        if stop <= 0:
            return
        if start < stop:
            yield from enumerate(batch.slice(start, stop - start).to_pylist(), first + start + 1)
        first += batch.num_rows

"""Tables that are text: each row begins at a byte and on a line."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from contrastive.shards.record import Segment
from contrastive.shards.tables import Row, TableSource
from contrastive.shards.text_lines import Lines

Placed = tuple[int, int, dict[str, Any]]  # the byte and the line where a row begins, and its cells


class TextSource(TableSource):
    """Rows that are read from a byte offset on."""

    unit = "line"

    def _placed(self, lines: Lines, file: int) -> Iterator[Placed]:
        """The rows from where `lines` is, except a header."""
        raise NotImplementedError

    def _rows(self, segment: Segment, columns: Sequence[str] | None = None) -> Iterator[Row]:
        lines = Lines(self.files[segment.file], segment.at, segment.line)
        for _, line, row in itertools.islice(self._placed(lines, segment.file), segment.rows):
            yield line, row

    def _has_paths(self) -> bool:
        return True

    def _places(self, file: int, note: Callable[[Mapping[str, Any]], None] | None) -> tuple[Any, Any]:
        starts, numbers = array("q"), array("q")
        lines = Lines(self.files[file])
        for at, line, row in self._placed(lines, file):
            starts.append(at)
            numbers.append(line)
            if note is not None:
                note(row)
        self._not_utf8[file] = lines.bad
        return starts, numbers

    @property
    def _not_utf8(self) -> dict[int, list[int]]:
        """By file, the lines that are not UTF-8."""
        return self.__dict__.setdefault("_bad", {})

    @property
    def notes(self) -> list[str]:
        found = super().notes
        for file, bad in sorted(self._not_utf8.items()):
            if bad:
                more = f" and {len(bad) - 1:,} more" if len(bad) > 1 else ""
                found.append(
                    f"{self.files[file]}: line {bad[0]}{more} not UTF-8 (Windows-1252 or Latin-1?); rows whose "
                    "caption or label is not are left out; save the file as UTF-8"
                )
        return found

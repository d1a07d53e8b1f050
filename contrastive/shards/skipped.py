"""Rows of a source that did not become pairs: counts by reason, and one line for each in rejected.jsonl.

Every part writes its own piece. The pieces are joined in order when all parts are made, so that the file does not
depend on interruptions or on the number of processes.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from contrastive.shards.record import Record, SkippedRow
from contrastive.shards.saving import write_aside

REJECTED = "rejected.jsonl"


class Skip(NamedTuple):
    """The reason why a row is skipped, the same text for the same fault, and the value that it is about."""

    reason: str
    detail: str | None = None


def line_of(row: SkippedRow) -> bytes:
    """The JSON object with a line break; bytes of a key that are not UTF-8 become escapes."""
    return json.dumps(row._asdict(), ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


class SkippedRows:
    """The skipped rows of one part."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._lines: list[tuple[int, bytes]] = []

    def add(self, number: int, record: Record, skip: Skip) -> None:
        """Count a row. number: its place in the part."""
        self.counts[skip.reason] += 1
        row = SkippedRow(record.key, skip.reason, skip.detail, record.place)
        self._lines.append((number, line_of(row)))

    def save(self, path: Path) -> None:
        """Write the lines in the order of the rows; no file where no row was skipped."""
        if self._lines:
            write_aside(path, b"".join(line for _, line in sorted(self._lines)))


def join_pieces(path: Path, before: Iterable[SkippedRow], pieces: Iterable[Path]) -> None:
    """Write rejected.jsonl: the lines of `before`, then the pieces that exist. Without any line, no file is made."""
    present = [piece for piece in pieces if piece.exists()]
    lines = map(line_of, before)
    first = next(lines, b"")
    if not first and not present:
        return

    def write(file: IO[bytes]) -> None:
        file.write(first)
        file.writelines(lines)
        for piece in present:
            with open(piece, "rb") as more:
                shutil.copyfileobj(more, file)

    write_aside(path, write)


def examples(reasons: Collection[str], pieces: Iterable[Path]) -> dict[str, SkippedRow]:
    """The first skipped row of each reason."""
    found: dict[str, SkippedRow] = {}
    for row in _read(pieces):
        found.setdefault(row.reason, row)
        if len(found) == len(reasons):
            break
    return found


def _read(pieces: Iterable[Path]) -> Iterator[SkippedRow]:
    for piece in pieces:
        if piece.exists():
            with open(piece, "rb") as lines:
                yield from (SkippedRow(**json.loads(line)) for line in lines)

"""Rows of a table with the same image become one record with several captions.

Each row has a role (`Part.roles`). A row that follows directly on a row with the same image gives its caption to that
record while the file is read, and costs no memory. The captions of other repetitions are held in memory by the process
that cuts the source into parts, about 200 bytes a row, and at most MAX_APART of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from contrastive.errors import UserError
from contrastive.shards.record import APART, BEFORE, OWN, Part, Record, Segment

MAX_APART = 4_000_000  # rows that repeat an image which is not directly before: about 1 GB of captions
DIFFERENT_LABELS = "rows with the same image have different labels"
Texts = tuple[tuple[str, ...], tuple[str, ...]]  # captions and labels


@dataclass
class Layout:
    """The places of a table's rows.

    starts: for each file, where each row lies, as in `Segment`. lines: the line of each row, for files of text.
    roles: of all rows, None where no image repeats. more: see `Part.more`, by the number of the row in the source.
    """

    starts: list[Sequence[int]]
    lines: list[Sequence[int]]
    roles: np.ndarray | None = None
    more: dict[int, Texts] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.first = np.cumsum([0, *map(len, self.starts)]).tolist()  # row of each file; the last is their number

    @property
    def rows(self) -> int:
        return self.first[-1]

    @property
    def records(self) -> int:
        return self.rows if self.roles is None else int(np.count_nonzero(self.roles == OWN))

    def cut(self, size: int, limit: int | None) -> list[Part]:
        """Parts of `size` records, the last may be shorter; at most `limit` records in all."""
        records = self.records if limit is None else min(limit, self.records)
        owns = None if self.roles is None else np.flatnonzero(self.roles == OWN)
        parts = []
        for number, start in enumerate(range(0, records, size)):
            stop = min(start + size, records)
            if owns is None:
                parts.append(Part(number, start, self._segments(start, stop)))
                continue
            # the rows after the last record may hold captions of it, and are of no use to the next part
            first = int(owns[start])
            last = int(owns[stop]) if stop < len(owns) else self.rows
            parts.append(self.part(number, first, last))
        return parts

    def part(self, number: int, first: int, last: int) -> Part:
        """The rows from `first` to before `last`; `first` has a record of its own."""
        part = Part(number, first, self._segments(first, last))
        if self.roles is None:
            return part
        roles = self.roles[first:last]
        own = (np.flatnonzero(roles == OWN) + first).tolist() if self.more else []
        more = {row - first: self.more[row] for row in own if row in self.more}
        return replace(part, roles=roles.tobytes(), more=more)

    def _segments(self, first: int, last: int) -> tuple[Segment, ...]:
        segments = []
        for file, starts in enumerate(self.starts):
            begin, end = max(first, self.first[file]), min(last, self.first[file + 1])
            if begin < end:
                row = begin - self.first[file]
                line = self.lines[file][row] if self.lines[file] else 1
                segments.append(Segment(file, starts[row], end - begin, line))
        return tuple(segments)


def roles_of(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """The role of each row, and the row whose record it belongs to; None where no image repeats.

    ids: int64 (rows,), equal for rows with the same image; 0 for rows that stay alone.

    Raises UserError for more than MAX_APART captions that would have to be held in memory.
    """
    rows = np.arange(len(ids))
    order = np.argsort(ids, kind="stable")
    ordered = ids[order]
    begins = np.ones(len(ids), bool)
    begins[1:] = (ordered[1:] != ordered[:-1]) | (ordered[1:] == 0)
    if begins.all():
        return None
    leader = np.empty_like(rows)
    leader[order] = order[np.maximum.accumulate(np.where(begins, rows, 0))]
    changes = np.ones(len(ids), bool)
    changes[1:] = leader[1:] != leader[:-1]
    run = np.maximum.accumulate(np.where(changes, rows, 0))
    roles = np.where(leader == rows, OWN, np.where(run == leader, BEFORE, APART)).astype(np.uint8)
    apart = int(np.count_nonzero(roles == APART))
    if apart > MAX_APART:
        raise UserError(
            f"{apart:,} rows repeat the image of a row that is not directly before them (limit: {MAX_APART:,}); "
            "sort the table by its image column, or make every row a pair (shard --no-group)"
        )
    return roles, leader


def joined(record: Record, captions: list[str], labels: list[str], more: Texts | None) -> Record:
    """The record with the captions of the other rows of its image, in the order of the rows, without repetitions."""
    if more is not None:
        captions, labels = [*captions, *more[0]], [*labels, *more[1]]
    if not captions and not labels:
        return record
    record = replace(record, captions=tuple(dict.fromkeys([*record.captions, *captions])))
    found = dict.fromkeys([record.label, *labels] if record.label is not None else labels)
    if len(found) > 1:
        shown = ", ".join(str(label) for label in list(found)[:5])
        return replace(record, fault=record.fault or DIFFERENT_LABELS, detail=record.detail or shown)
    return replace(record, label=next(iter(found), None))


def merge_more(more: dict[int, tuple[list[str], list[str]]]) -> dict[int, Texts]:
    """Lists that grew, as they are sent to other processes."""
    return {row: (tuple(captions), tuple(labels)) for row, (captions, labels) in more.items()}

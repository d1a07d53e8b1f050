"""Remarks on how a source is read and what it leaves out, for every command to print."""

from __future__ import annotations

from os import PathLike
from typing import Any

from contrastive.printable import printable
from contrastive.shards import open_source
from contrastive.shards.left_out import left_out_line, of_captions_alone


def source_remarks(source: Any, *, captions: bool = True) -> list[str]:
    """One line each: the notes of a source (a path is opened), and the counts of what is no sample; often none.

    captions: False leaves out what concerns captions alone, for a command that reads images only.
    """
    opened = open_source(source) if isinstance(source, (str, PathLike)) else source
    notes, rejected = list(getattr(opened, "notes", [])), dict(getattr(opened, "rejected", {}))
    if not captions:
        skipped = set(getattr(opened, "caption_notes", []))
        notes = [note for note in notes if note not in skipped]
        rejected = {reason: count for reason, count in rejected.items() if not of_captions_alone(reason)}
    return [printable(line) for line in (*notes, left_out_line(rejected)) if line]

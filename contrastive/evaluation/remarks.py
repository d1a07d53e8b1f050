"""Remarks on how a source is read and what it leaves out, for every command to print."""

from __future__ import annotations

from os import PathLike
from typing import Any

from contrastive.printable import printable
from contrastive.shards import open_source
from contrastive.shards.left_out import left_out_line


def source_remarks(source: Any) -> list[str]:
    """One line each: the notes of a source (a path is opened), and the counts of what is no sample; often none."""
    opened = open_source(source) if isinstance(source, (str, PathLike)) else source
    lines = [*getattr(opened, "notes", []), left_out_line(getattr(opened, "rejected", {}))]
    return [printable(line) for line in lines if line]

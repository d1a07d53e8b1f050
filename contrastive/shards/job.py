"""The job of making shards, its tasks, and the files in which finished parts are saved."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from contrastive.errors import UserError
from contrastive.shards.decode import DECODER_VERSION
from contrastive.shards.filters import Filters, Scorer, Transform
from contrastive.shards.keys import changed_key, safe_key
from contrastive.shards.record import OWN, Part, Record, Source
from contrastive.shards.skipped import REJECTED

VERSION = 2
# Columns of `Job.ids`: hashes of the key as it is safe, as the source gives it and as it is written, hash of the
# caption, and the row's number in the part.
SAFE, PLAIN, WRITTEN, CAPTION, ROW = range(5)


class Hopeless(UserError):
    """The source must be corrected first: the parts that were made of it are of no use."""


@dataclass(frozen=True)
class Job:
    """The settings that every part is made with.

    folder: where the shards grow; all processes must see it. verify: decode every image.
    """

    source: Source
    folder: Path
    filters: Filters
    transform: Transform
    scorer: Scorer | None
    verify: bool = False

    def identity(self, size: int) -> dict[str, Any]:
        """The settings that decide the bytes."""
        decoded = self.transform or self.scorer or self.verify
        return ({"decoder": DECODER_VERSION} if decoded else {}) | {
            "version": VERSION,
            "source": self.source.identity(),
            "samples_per_shard": size,
            "filters": asdict(self.filters),
            "transform": asdict(self.transform),
            "scorer": self.scorer.identity() if self.scorer else None,
            "verify": self.verify,
        }

    def counts(self, number: int) -> Path:
        return self.folder / "parts" / f"{number:05d}.json"

    def seen(self, number: int) -> Path:
        return self.folder / "parts" / f"{number:05d}.seen.npy"

    def ids(self, number: int) -> Path:
        return self.folder / "parts" / f"{number:05d}.ids.npy"

    def rejected(self, number: int) -> Path:
        return self.folder / "parts" / f"{number:05d}.{REJECTED}"

    def saved_counts(self, part: Part) -> dict[str, Any]:
        counts: dict[str, Any] = json.loads(self.counts(part.number).read_text(encoding="utf-8"))
        return counts

    def column(self, parts: Sequence[Part], column: int) -> np.ndarray:
        """One column of the ids of all parts: int64 (pairs,)."""
        found = [np.load(self.ids(part.number), allow_pickle=False)[:, column].copy() for part in parts]
        return np.concatenate(found) if found else np.zeros(0, np.int64)


@dataclass(frozen=True)
class Task:
    """A part, and the facts about its rows that depend on the rows of all parts.

    repeats: a byte a row, a number of DUPLICATES, or empty. changes: a byte a row, bits of `key_changes`, or empty.
    prefixes: names of the files whose keys change.
    """

    part: Part
    repeats: bytes = b""
    changes: bytes = b""
    prefixes: dict[int, str] = field(default_factory=dict)

    def key(self, number: int, record: Record, files: np.ndarray) -> str:
        """The key that a row gets in the shards. files: see `files_of`."""
        if not self.changes:
            return safe_key(record.key)
        return changed_key(record.key, self.changes[number], self.prefixes.get(int(files[number]), ""))

    def naming(self) -> str:
        """A digest of the changed keys; "" where none is."""
        if not any(self.changes):
            return ""
        return hashlib.blake2b(repr((self.changes, sorted(self.prefixes.items()))).encode(), digest_size=8).hexdigest()


def files_of(part: Part) -> np.ndarray:
    """The number of each record's file: int64 (records,)."""
    files, rows = ([getattr(segment, name) for segment in part.segments] for name in ("file", "rows"))
    found = np.repeat(np.array(files, np.int64), rows)
    return found[np.frombuffer(part.roles, np.uint8) == OWN] if part.roles else found

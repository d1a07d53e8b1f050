"""Makes the keys of all shards unique, after the parts are made: only parts with repeated keys are made again."""

from __future__ import annotations

import itertools
import tarfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from contrastive.shards.job import PLAIN, ROW, SAFE, WRITTEN, Hopeless, Job, Task, files_of
from contrastive.shards.keys import PREFIX, file_prefixes, has_repeats, key_changes, repeats
from contrastive.shards.pools import Runner
from contrastive.shards.record import Part


def make_keys_unique(job: Job, tasks: Sequence[Task], runner: Runner, make_part: Callable[[Any, Any], None]) -> None:
    """Make the parts again in which a key repeats one of another file, with other keys. Most sources have none."""
    parts = [task.part for task in tasks]
    safe = job.column(parts, SAFE)
    if not has_repeats(safe):
        return
    rows = [np.load(job.ids(part.number), allow_pickle=False)[:, ROW].copy() for part in parts]
    files = np.concatenate([files_of(part)[own] for part, own in zip(parts, rows, strict=True)])
    ends = np.cumsum([len(own) for own in rows])
    changes, clash = key_changes(safe, job.column(parts, PLAIN), files)
    if clash:
        raise Hopeless(_same_key(job, parts, rows, ends, clash))
    prefixes = dict(enumerate(file_prefixes(job.source.files))) if (changes & PREFIX).any() else {}
    changed = []
    for task, own, found in zip(tasks, rows, np.split(changes, ends[:-1]), strict=True):
        every = np.zeros(task.part.records, np.uint8)
        every[own] = found
        own_files = {segment.file for segment in task.part.segments} & prefixes.keys()
        new = Task(task.part, task.repeats, every.tobytes(), {file: prefixes[file] for file in own_files})
        if new.naming() != job.saved_counts(task.part)["naming"]:
            changed.append(new)
    for _ in runner(make_part, job, changed, "making shards with unique keys"):
        pass
    for pair in repeats(job.column(parts, WRITTEN)):
        first, second = (_written_key(job, rows, ends, number) for number in pair)
        if first == second:  # not only their hashes
            raise Hopeless(_same_key(job, parts, rows, ends, pair))


def _written_key(job: Job, rows: list[np.ndarray], ends: np.ndarray, number: int) -> str:
    """The key in the shards. number: of the pair among all pairs."""
    part = int(np.searchsorted(ends, number, "right"))
    with tarfile.open(job.folder / f"{part:05d}.tar") as tar:
        return tar.getnames()[3 * (number - int(ends[part]) + len(rows[part])) + 1].removesuffix(".txt")


def _same_key(job: Job, parts: Sequence[Part], rows: list[np.ndarray], ends: np.ndarray, pair: tuple[int, int]) -> str:
    """The error for two pairs with one key. pair: their numbers among all pairs."""
    found = []
    for number in pair:
        at = int(np.searchsorted(ends, number, "right"))
        row = int(rows[at][number - int(ends[at]) + len(rows[at])])
        record = next(itertools.islice(job.source.read(parts[at]), row, None))
        found.append((record.key, record.place or f"row {parts[at].row + row + 1:,}"))
    (key, first), (other, second) = found
    keys = f"key '{key}' occurs twice" if key == other else f"keys '{key}' and '{other}' are the same in a shard"
    remedy = "drop or rename the column 'key' to have the rows numbered" if "key" in job.source.columns else ""
    return f"{keys}: {first} and {second}; give every pair a key of its own{remedy and ', or '}{remedy}"

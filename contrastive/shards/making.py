"""Making shards at scale: one part of a source in, one shard out, any number of processes or machines.

Everything grows in a folder `NAME.unfinished` beside the destination, which takes the destination's name in one
rename when it is complete. There, part i becomes `0000i.tar` (if it has pairs) and, when that is safely on the
disk, `parts/0000i.json` with its counts. A part whose counts exist is never made again, so that a run which was
interrupted goes on where it stopped; and as a part depends on nothing but the source and the settings, the bytes
are the same as without the interruption.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from contrastive.errors import UserError
from contrastive.locks import Busy, only_one
from contrastive.shards.filters import DUPLICATES, Filters, Scorer, Transform, pair_ids, repeated, upright
from contrastive.shards.index import PathLike
from contrastive.shards.pools import Runner, run_here
from contrastive.shards.record import Part, Record, Rejected, Source
from contrastive.shards.write import (
    MANIFEST,
    Manifest,
    add_pair,
    check_free,
    fault_of,
    nothing_to_write,
    safe_key,
    swap,
)

VERSION = 1
BATCH = 64  # pairs that are scored together


@dataclass(frozen=True)
class Job:
    """What every part is made with. folder: where the shards grow; all processes must see it."""

    source: Source
    folder: Path
    filters: Filters
    transform: Transform
    scorer: Scorer | None

    def identity(self, size: int) -> dict[str, Any]:
        """The settings that decide the bytes."""
        return {
            "version": VERSION,
            "source": self.source.identity(),
            "samples_per_shard": size,
            "filters": asdict(self.filters),
            "transform": asdict(self.transform),
            "scorer": self.scorer.identity() if self.scorer else None,
        }

    def counts(self, number: int) -> Path:
        return self.folder / "parts" / f"{number:05d}.json"

    def seen(self, number: int) -> Path:
        return self.folder / "parts" / f"{number:05d}.seen.npy"

    def written(self, number: int) -> Path:
        return self.folder / "parts" / f"{number:05d}.ids.npy"


class Task(NamedTuple):
    """A part, and which of its rows repeat an earlier one: a byte a row, a number of DUPLICATES."""

    part: Part
    repeats: bytes = b""


def make_shards(
    source: Source,
    dest: PathLike,
    *,
    samples_per_shard: int = 1000,
    overwrite: bool = False,
    filters: Filters | None = None,
    transform: Transform | None = None,
    scorer: Scorer | None = None,
    runner: Runner = run_here,
) -> Manifest:
    """Make one shard of every `samples_per_shard` rows of `source`, in the folder `dest`.

    The bytes depend on the source and the settings, not on the runner nor on interruptions; a shard holds fewer
    pairs where rows are left out. With the settings of a finished folder, nothing is done.

    Raises UserError: `dest` is in use (unless `overwrite`), it was begun with other settings, another process is
    making it, a key occurs twice, no row is a pair, the disk is full, a process died.
    """
    if samples_per_shard < 1:
        raise UserError(f"samples_per_shard {samples_per_shard}: give at least 1")
    dest = Path(os.path.abspath(dest))
    folder = dest.with_name(f"{dest.name}.unfinished")
    job = Job(source, folder, filters or Filters(), transform or Transform(), scorer)
    settings = job.identity(samples_per_shard)
    if not overwrite and (done := _finished(dest, settings)):
        return done
    if not overwrite and (dest / MANIFEST).is_file():
        raise UserError(
            f"{dest}: holds finished shards of another source or other settings; give another folder, or --overwrite"
        )
    check_free(dest, overwrite)
    with _disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            (folder / "parts").mkdir(exist_ok=True)
            for left in [*folder.glob("*.tar.*"), *folder.glob("**/*.aside-*")]:  # of a process that was killed
                left.unlink(missing_ok=True)
            if not (folder / MANIFEST).exists():
                _begin(folder, settings)
                try:
                    manifest = _make_all(job, source.cut(samples_per_shard), runner)
                except _Hopeless:
                    shutil.rmtree(folder, ignore_errors=True)
                    raise
                text = json.dumps({**asdict(manifest), "settings": _digest(settings)}, indent=1) + "\n"
                _write_aside(folder / MANIFEST, text.encode())
            elif json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["settings"] != _digest(settings):
                raise _begun_otherwise(folder)
            for name in ("parts", "settings.json"):  # killed here, the next run finds the manifest and goes on
                path = folder / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            swap(folder, dest)
    return _read_manifest(dest)


class _Hopeless(UserError):
    """The source must be mended first: what was made of it is of no use."""


def _make_all(job: Job, parts: list[Part], runner: Runner) -> Manifest:
    tasks = [Task(part) for part in parts]
    if job.filters.deduplicate:
        scans = [task for task in tasks if not job.seen(task.part.number).exists()]
        for _ in runner(scan_part, job, scans, "looking for duplicates"):
            pass
        tasks = _with_repeats(job, tasks)
    missing = [task for task in tasks if not job.counts(task.part.number).exists()]
    for _ in runner(make_part, job, missing, "making shards"):
        pass
    skipped = Counter(job.source.rejected)
    shards = []
    for part in parts:
        counts = json.loads(job.counts(part.number).read_text(encoding="utf-8"))
        skipped.update(counts["skipped"])
        if counts["pairs"]:
            shards.append(f"{part.number:05d}.tar")
    ids = [np.load(job.written(part.number), allow_pickle=False) for part in parts]
    pairs = sum(map(len, ids))
    if not pairs:
        raise _Hopeless(str(nothing_to_write(skipped, job.source.columns)))
    _check_keys(job, [rows[:, 0] for rows in ids])
    captions = len(np.unique(np.concatenate([rows[:, 1] for rows in ids])))
    return Manifest(pairs, shards, dict(sorted(skipped.items())), pairs - captions)


def scan_part(job: Job, task: Task) -> None:
    """Note the hashes of a part's pairs, for the search for duplicates."""
    rows = [
        (number, *pair_ids(record))
        for number, record in enumerate(job.source.read(task.part))
        if not (fault_of(record) or job.filters.reason(record))
    ]
    _save_rows(job.seen(task.part.number), rows, 3)


def make_part(job: Job, task: Task) -> None:
    """Make the shard of one part: aside first, then by one rename; its counts last."""
    number = task.part.number
    shard = job.folder / f"{number:05d}.tar"
    aside = job.folder / f"{number:05d}.tar.{os.getpid()}"
    skipped: Counter[str] = Counter()
    ids: list[tuple[int, int]] = []
    with _disk_errors(shard):
        try:
            with open(aside, "wb") as file:
                with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
                    for record in _kept(job, task, skipped):
                        key = safe_key(record.key)
                        ids.append((_text_id(key), pair_ids(record)[1]))
                        add_pair(tar, key, record)
                file.flush()
                os.fsync(file.fileno())
            if ids:
                os.replace(aside, shard)
            _save_rows(job.written(number), ids, 2)
            counts = {"part": number, "pairs": len(ids), "skipped": dict(sorted(skipped.items()))}
            _write_aside(job.counts(number), json.dumps(counts).encode())
        finally:
            aside.unlink(missing_ok=True)


def _kept(job: Job, task: Task, skipped: Counter[str]) -> Iterator[Record]:
    """The pairs of a part as they are written; the others are counted."""
    waiting: list[tuple[Record, Any]] = []
    for number, record in enumerate(job.source.read(task.part)):
        reason = fault_of(record) or job.filters.reason(record)
        if not reason and task.repeats:
            reason = DUPLICATES[task.repeats[number]]
        prepared = None
        if not reason and (job.transform or job.scorer):
            assert record.image is not None
            try:
                image = upright(record.image)
                prepared = job.scorer.prepare(image) if job.scorer else None
                record = job.transform.apply(record, image) if job.transform else record
            except Rejected as rejected:
                reason = rejected.reason
        if reason:
            skipped[reason] += 1
            continue
        waiting.append((record, prepared))
        if len(waiting) == BATCH or not job.scorer:
            yield from _scored(job, waiting, skipped)
            waiting = []
    yield from _scored(job, waiting, skipped)


def _scored(job: Job, batch: list[tuple[Record, Any]], skipped: Counter[str]) -> Iterator[Record]:
    if not job.scorer or not batch:
        yield from (record for record, _ in batch)
        return
    scores = job.scorer.score([image for _, image in batch], [record.captions[0] for record, _ in batch])
    for (record, _), score in zip(batch, scores, strict=True):
        if score >= job.scorer.minimum:
            yield record
        else:
            skipped["score too low"] += 1


def _with_repeats(job: Job, tasks: Sequence[Task]) -> list[Task]:
    """The first in source order is kept: decided once, over all parts."""
    assert job.filters.deduplicate
    seen = [np.load(job.seen(task.part.number), allow_pickle=False) for task in tasks]
    found = repeated(np.concatenate(seen)[:, 1:] if seen else np.zeros((0, 2), np.int64), job.filters.deduplicate)
    result, start = [], 0
    for task, rows in zip(tasks, seen, strict=True):
        repeats = np.zeros(sum(segment.rows for segment in task.part.segments), np.uint8)
        repeats[rows[:, 0]] = found[start : start + len(rows)]
        start += len(rows)
        result.append(Task(task.part, repeats.tobytes()))
    return result


def _check_keys(job: Job, ids: list[np.ndarray]) -> None:
    every = np.concatenate(ids)
    order = np.argsort(every, kind="stable")
    ends = np.cumsum([len(rows) for rows in ids])

    def key(row: int) -> str:
        part = int(np.searchsorted(ends, row, "right"))
        with tarfile.open(job.folder / f"{part:05d}.tar") as tar:
            return tar.getnames()[3 * (row - int(ends[part]) + len(ids[part])) + 1].removesuffix(".txt")

    for at in np.flatnonzero(every[order][1:] == every[order][:-1]):
        first, second = key(int(order[at])), key(int(order[at + 1]))
        if first == second:  # not only their hashes
            raise _Hopeless(f"key '{first}' occurs twice; give every pair a key of its own")


def _text_id(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _begin(folder: Path, settings: dict[str, Any]) -> None:
    path = folder / "settings.json"
    if not path.exists():
        _write_aside(path, json.dumps(settings, indent=1).encode())
    elif json.loads(path.read_text(encoding="utf-8")) != json.loads(json.dumps(settings)):
        raise _begun_otherwise(folder)


def _begun_otherwise(folder: Path) -> UserError:
    return UserError(
        f"{folder}: begun with other settings or another state of the source; give the same ones to go on, "
        "or delete that folder to start anew"
    )


def _finished(dest: Path, settings: dict[str, Any]) -> Manifest | None:
    try:
        saved = json.loads((dest / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    same = isinstance(saved, dict) and saved.get("settings") == _digest(settings)
    if not same or not all((dest / name).is_file() for name in saved["shards"]):
        return None
    return _read_manifest(dest)


def _read_manifest(dest: Path) -> Manifest:
    saved = json.loads((dest / MANIFEST).read_text(encoding="utf-8"))
    return Manifest(saved["pairs"], saved["shards"], saved["skipped"], saved["duplicate_captions"])


def _digest(settings: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16).hexdigest()


def _save_rows(path: Path, rows: Iterable[tuple[int, ...]], columns: int) -> None:
    _write_aside(path, lambda file: np.save(file, np.array(list(rows), np.int64).reshape(-1, columns)))


def _write_aside(path: Path, content: bytes | Callable[[Any], None]) -> None:
    """Write a small file so that it is there complete or not at all, and survives a loss of power."""
    aside = path.with_name(f"{path.name}.aside-{os.getpid()}")
    try:
        with open(aside, "wb") as file:
            file.write(content) if isinstance(content, bytes) else content(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as fault:
        if fault.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise
        why = os.strerror(fault.errno)
        raise UserError(f"{path}: {why}; make room and run the same command again, finished parts are kept") from None


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes from making the same shards."""
    try:
        with only_one(folder):
            yield
    except Busy:
        raise UserError(f"{folder}: another process is making these shards; wait for it, or stop it") from None

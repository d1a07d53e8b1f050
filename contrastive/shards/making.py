"""Makes shards at scale: one part of a source in, one shard out, on any number of processes or machines.

Everything grows in a folder `NAME.unfinished` beside the destination, which takes the destination's name in one
rename when it is complete. There, part i becomes `0000i.tar` (if it has pairs) and, when that is safely on the
disk, `parts/0000i.json` with its counts. A part whose counts exist is not made again, so that an interrupted run
continues where it stopped. A part depends on nothing but the source and the settings, so that the bytes are the same
as without the interruption. (Where keys repeat, some parts are made a second time, with other keys; see `keys`.)
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from contrastive.errors import UserError
from contrastive.shards.decode import decode_image, outdated
from contrastive.shards.filters import DUPLICATES, Filters, Scorer, Transform, pair_ids, repeated
from contrastive.shards.index import PathLike, caption_id
from contrastive.shards.job import CAPTION, Hopeless, Job, Task, files_of
from contrastive.shards.keys import MARK, PREFIX, plain_id, renamed_note, safe_key, text_id
from contrastive.shards.pools import Runner, run_here
from contrastive.shards.record import Part, Record, Rejected, Source
from contrastive.shards.remedies import nothing_to_write
from contrastive.shards.saving import alone, disk_errors, save_rows, write_aside
from contrastive.shards.skipped import REJECTED, Skip, SkippedRows, examples, join_pieces
from contrastive.shards.unique import make_keys_unique
from contrastive.shards.write import MANIFEST, Manifest, add_pair, check_free, fault_of, swap

BATCH = 64  # pairs that are scored together


def make_shards(
    source: Source,
    dest: PathLike,
    *,
    samples_per_shard: int = 1000,
    overwrite: bool = False,
    filters: Filters | None = None,
    transform: Transform | None = None,
    scorer: Scorer | None = None,
    verify: bool = False,
    runner: Runner = run_here,
) -> Manifest:
    """Make one shard of every `samples_per_shard` rows of `source`, in the folder `dest`.

    The bytes depend on the source and the settings, not on the runner nor on interruptions; a shard holds fewer
    pairs where rows are left out. With the settings of a finished folder, nothing is done.

    Skipped rows are listed in `rejected.jsonl` there. verify: decode every image, so that those which training could
    not decode are skipped.

    Raises UserError: `dest` is in use (unless `overwrite`), it was begun with other settings, another process is
    making it, a key occurs twice in one file, no row is a pair, the disk is full, a process died.
    """
    if samples_per_shard < 1:
        raise UserError(f"samples_per_shard {samples_per_shard}: give at least 1")
    dest = Path(os.path.abspath(dest))
    folder = dest.with_name(f"{dest.name}.unfinished")
    job = Job(source, folder, filters or Filters(), transform or Transform(), scorer, verify)
    settings = job.identity(samples_per_shard)
    if not overwrite and (done := _finished(dest, settings)):
        return done
    if not overwrite and (dest / MANIFEST).is_file():
        raise UserError(
            f"{dest}: holds finished shards of another source or other settings; give another folder, or --overwrite"
        )
    check_free(dest, overwrite)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with alone(folder):
            (folder / "parts").mkdir(exist_ok=True)
            for left in [*folder.glob("*.tar.*"), *folder.glob("**/*.aside-*")]:  # of a process that was killed
                left.unlink(missing_ok=True)
            if not (folder / MANIFEST).exists():
                _begin(folder, settings)
                try:
                    manifest = _make_all(job, source.cut(samples_per_shard), runner)
                except Hopeless:
                    shutil.rmtree(folder, ignore_errors=True)
                    raise
                text = json.dumps({**asdict(manifest), "settings": _digest(settings)}, indent=1) + "\n"
                write_aside(folder / MANIFEST, text.encode())
            elif json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["settings"] != _digest(settings):
                raise _begun_otherwise(folder)
            for name in ("parts", "settings.json"):  # killed here, the next run finds the manifest and goes on
                path = folder / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            swap(folder, dest)
    return _read_manifest(dest)


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
    make_keys_unique(job, tasks, runner, make_part)
    skipped = Counter(job.source.rejected)
    renamed: Counter[str] = Counter()
    renamed_like: dict[str, str] = {}
    shards = []
    pairs = 0
    for part in parts:
        counts = job.saved_counts(part)
        skipped.update(counts["skipped"])
        renamed.update(counts["renamed"])
        renamed_like = {**counts["renamed_like"], **renamed_like}
        pairs += counts["pairs"]
        if counts["pairs"]:
            shards.append(f"{part.number:05d}.tar")
    pieces = [job.rejected(part.number) for part in parts]
    if not pairs:
        found = examples(set(skipped) - set(job.source.rejected), pieces)
        raise Hopeless(nothing_to_write(skipped - Counter(job.source.rejected), found, job.source, job.filters))
    join_pieces(job.folder / REJECTED, job.source.rejections(), pieces)
    captions = len(np.unique(job.column(parts, CAPTION)))
    notes = renamed_note(renamed, renamed_like)
    return Manifest(pairs, shards, dict(sorted(skipped.items())), pairs - captions, notes)


def scan_part(job: Job, task: Task) -> None:
    """Save the hashes of a part's pairs, for the search for duplicates."""
    rows = [
        (number, *pair_ids(record))
        for number, record in enumerate(job.source.read(task.part))
        if not (fault_of(record) or job.filters.skip(record))
    ]
    save_rows(job.seen(task.part.number), rows, 3)


def make_part(job: Job, task: Task) -> None:
    """Make the shard of one part: aside first, then by one rename; its counts last."""
    number = task.part.number
    shard = job.folder / f"{number:05d}.tar"
    aside = job.folder / f"{number:05d}.tar.{os.getpid()}"
    skipped = SkippedRows()
    ids: list[tuple[int, int, int, int, int]] = []
    renamed: Counter[str] = Counter()
    renamed_like: dict[str, str] = {}
    files = files_of(task.part)
    with disk_errors(shard):
        try:
            with open(aside, "wb") as file:
                with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
                    for row, record in _kept(job, task, skipped):
                        safe, key = safe_key(record.key), task.key(row, record, files)
                        keys = text_id(safe), plain_id(record.key), text_id(key, "written")
                        ids.append((*keys, caption_id(record.captions[0]), row))
                        for kind, bit in (("prefix", PREFIX), ("mark", MARK)):
                            if task.changes and task.changes[row] & bit:
                                renamed[kind] += 1
                                renamed_like.setdefault(kind, key)
                        add_pair(tar, key, record)
                file.flush()
                os.fsync(file.fileno())
            if ids:
                os.replace(aside, shard)
            save_rows(job.ids(number), ids, 5)
            skipped.save(job.rejected(number))
            counts = {
                "part": number,
                "pairs": len(ids),
                "skipped": dict(sorted(skipped.counts.items())),
                "naming": task.naming(),
                "renamed": renamed,
                "renamed_like": renamed_like,
            }
            write_aside(job.counts(number), json.dumps(counts).encode())
        finally:
            aside.unlink(missing_ok=True)


def _kept(job: Job, task: Task, skipped: SkippedRows) -> Iterator[tuple[int, Record]]:
    """The pairs of a part as they are written, with their numbers in the part; the others are added to `skipped`."""
    waiting: list[tuple[int, Record, Any]] = []
    for number, record in enumerate(job.source.read(task.part)):
        skip = fault_of(record) or job.filters.skip(record)
        if not skip and task.repeats and (repeat := DUPLICATES[task.repeats[number]]):
            skip = Skip(repeat)
        prepared = None
        if not skip and (job.verify or job.transform or job.scorer):
            assert record.image is not None
            try:
                image = decode_image(record.image)
                prepared = job.scorer.prepare(image) if job.scorer else None
                record = job.transform.apply(record, image) if job.transform else record
            except Rejected as rejected:
                skip = Skip(rejected.reason, rejected.detail)
        if skip:
            skipped.add(number, record, skip)
            continue
        waiting.append((number, record, prepared))
        if len(waiting) == BATCH or not job.scorer:
            yield from _scored(job, waiting, skipped)
            waiting = []
    yield from _scored(job, waiting, skipped)


def _scored(job: Job, batch: list[tuple[int, Record, Any]], skipped: SkippedRows) -> Iterator[tuple[int, Record]]:
    if not job.scorer or not batch:
        yield from ((number, record) for number, record, _ in batch)
        return
    scores = job.scorer.score([image for *_, image in batch], [record.captions[0] for _, record, _ in batch])
    for (number, record, _), score in zip(batch, scores, strict=True):
        if score >= job.scorer.minimum:
            yield number, record
        else:
            skipped.add(number, record, Skip("score too low", f"{score:.4f}"))


def _with_repeats(job: Job, tasks: Sequence[Task]) -> list[Task]:
    """The first in source order is kept: decided once, over all parts."""
    assert job.filters.deduplicate
    seen = [np.load(job.seen(task.part.number), allow_pickle=False) for task in tasks]
    found = repeated(np.concatenate(seen)[:, 1:] if seen else np.zeros((0, 2), np.int64), job.filters.deduplicate)
    result, start = [], 0
    for task, rows in zip(tasks, seen, strict=True):
        repeats = np.zeros(task.part.records, np.uint8)
        repeats[rows[:, 0]] = found[start : start + len(rows)]
        start += len(rows)
        result.append(Task(task.part, repeats.tobytes()))
    return result


def _begin(folder: Path, settings: dict[str, Any]) -> None:
    path = folder / "settings.json"
    if not path.exists():
        write_aside(path, json.dumps(settings, indent=1).encode())
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
    if not same or outdated(saved["skipped"]) or not all((dest / name).is_file() for name in saved["shards"]):
        return None
    return _read_manifest(dest)


def _read_manifest(dest: Path) -> Manifest:
    saved = json.loads((dest / MANIFEST).read_text(encoding="utf-8"))
    names = ("pairs", "shards", "skipped", "duplicate_captions", "notes")
    return Manifest(**{name: saved[name] for name in names if name in saved})  # older folders have no notes


def _digest(settings: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16).hexdigest()

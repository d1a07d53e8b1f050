"""Which pairs a set of tar shards holds, and where their bytes lie: a table to read any pair by.

The index is built once, by reading every header, text and first bytes (`scan`), saved beside the shards, and built
anew when a shard's name, size or modification time changes. It is two files: `index.tables`, arrays that are mapped
into memory and not read, and `index.json`, the manifest: what each shard is, and what was left out and why.
"""

import hashlib
import json
import os
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from contrastive.errors import UserError
from contrastive.shards import storage
from contrastive.shards.index_keys import unique_keys
from contrastive.shards.record import MAX_CAPTION_BYTES, Record, Rejected
from contrastive.shards.scan import (
    Scan,
    caption_id,
    caption_text,
    ignored_reason,
    json_captions,
    json_fault,
    scan_shard,
    sha256_of,
)
from contrastive.shards.shard_list import PathLike, Shard, find_shards
from contrastive.shards.tables_file import load_tables, save_tables
from contrastive.shards.tar import DamagedShard
from contrastive.wording import first_few

__all__ = ["PathLike", "ShardIndex", "caption_id", "find_shards", "open_index"]

VERSION = 5
TOGETHER = 2048  # bytes between two members of which to read through is cheaper than to read twice
OPEN_FILES = 64  # far below the usual limit of 1,024


class ShardIndex:
    """A random-access view of the pairs in a list of shards. Only good pairs have a number.

    shards: paths and URLs. folder: where files that belong to the shards are kept.
    shard: int32 (n,), the number of each sample's shard, not falling. shard_starts: int64 (S + 1,), the number of each
        shard's first sample, and n.
    ids: int64 (n,), equal where two captions are the same apart from case and white space.
    image_ids: int64 (n,), equal where two image files are equal, byte for byte.
    repeated_images: number of samples whose image occurred before.
    key_hashes: uint64 (n,), BLAKE2b of each key's UTF-8 bytes, little-endian: to join a set with other tables by.
    sizes: int64 (n, 3), bytes of the image, the text and the JSON.
    fingerprint: hexadecimal; the same for the same shards on every machine.
    rejected: counts of what the shards hold that is no pair, by reason. manifest: see `index.json`.

    Reading a sample raises Rejected where its shard changed since indexing or is not to be had.
    """

    def __init__(
        self, shards: list[Shard], folder: Path, manifest: dict[str, Any], tables: dict[str, np.ndarray], saved: Path
    ) -> None:
        self.shards, self.folder, self.manifest = shards, folder, manifest
        self.fingerprint: str = manifest["fingerprint"]
        self.rejected: dict[str, int] = dict(sorted(Counter(one["reason"] for one in manifest["rejected"]).items()))
        self._saved = saved
        self._set_tables(tables)

    def _set_tables(self, tables: dict[str, np.ndarray]) -> None:
        self._tables = tables
        self.ids, self.shard, self.sizes = tables["ids"], tables["shard"], tables["sizes"]
        self.image_ids, self.key_hashes = tables["image_ids"], tables["key_hashes"]
        self.shard_starts = np.searchsorted(self.shard, np.arange(len(self.shards) + 1)).astype(np.int64)
        self._places = tables["offsets"]
        self._stats = [(size, mtime) for size, mtime in tables["stats"].tolist()]
        self._files: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def repeated_images(self) -> int:
        return int(self.manifest["repeated_images"])

    @property
    def notes(self) -> list[str]:
        """One-line remarks on how the shards were read."""
        renamed = self.manifest["renamed"]
        if not renamed:
            return []
        keys = "1 key occurs" if renamed == 1 else f"{renamed:,} keys occur"
        return [f"{keys} in several shards with other content: the shard's name was put before them"]

    def key(self, i: int) -> str:
        """The sample's name."""
        ends = self._tables["key_ends"]
        start = int(ends[i - 1]) if i else 0
        return self._tables["keys"][start : int(ends[i])].tobytes().decode("utf-8", "surrogateescape")

    def image(self, i: int) -> bytes:
        """The encoded bytes of the image."""
        return self._read(i, 0)

    def caption(self, i: int) -> str:
        """The first caption."""
        if not self.sizes[i, 1]:  # no .txt, which is never empty here
            return self._json_captions(i)[0]
        return _text(self._read(i, 1))

    def pair(self, i: int) -> tuple[bytes | memoryview, str]:
        """`image` and `caption`, by one read and without a copy where they lie together, as in shards that we write."""
        (image_at, text_at, _), (image_size, text_size, _) = self._places[i].tolist(), self.sizes[i].tolist()
        first, last = min(image_at, text_at), max(image_at + image_size, text_at + text_size)
        if not text_size or last - first > image_size + text_size + TOGETHER:
            return self.image(i), self.caption(i)
        data = memoryview(self._bytes(int(self.shard[i]), last - first, first))
        image = data[image_at - first : image_at - first + image_size]
        return image, _text(bytes(data[text_at - first : text_at - first + text_size]))

    def captions(self) -> Iterator[str]:
        """The first caption of every sample, in order (to train a tokenizer on)."""
        return (self.caption(i) for i in range(len(self)))

    def variants(self, i: int) -> tuple[str, ...]:
        """The captions of a sample besides the first."""
        if not self.sizes[i, 1]:
            return tuple(filter(_fits, self._json_captions(i)[1:]))
        return _variants(self.caption(i), self._json(i))

    def record(self, i: int) -> Record:
        """Everything that the shard holds of sample i."""
        meta = self._json(i)
        caption = self.caption(i)
        captions = (caption, *self.variants(i))
        label = meta.pop("label", None)
        meta.pop("captions", None)
        if not self.sizes[i, 1]:
            meta = {name: value for name, value in meta.items() if value != caption}
        return Record(self.key(i), self.image(i), captions, None if label is None else str(label), meta)

    def verify(self) -> None:
        """Read all shards and compare them with the manifest's hashes. Raises UserError that names what differs."""
        wrong = []
        for shard, described in zip(self.shards, self.manifest["shards"], strict=True):
            if described["name"] not in self.manifest["damaged"]:
                if sha256_of(storage.local_path(shard)) != described["sha256"]:
                    wrong.append(described["name"])
        if wrong:
            raise UserError(
                f"{self.folder}: {first_few(wrong)}: not the bytes that were indexed, under the same size and time; "
                "copy them again, or touch them to have them indexed as they are"
            )

    def _json(self, i: int) -> dict[str, Any]:
        data = self._read(i, 2)
        if not data:
            return {}
        if json_fault(data):  # there was none when it was indexed
            raise Rejected("shard changed since indexing")
        value = json.loads(data)
        return value if isinstance(value, dict) else {}

    def _json_captions(self, i: int) -> tuple[str, ...]:
        captions = json_captions(self._json(i))
        if not captions:  # there was one when it was indexed
            raise Rejected("shard changed since indexing")
        return captions

    def _read(self, i: int, part: int) -> bytes:
        return self._bytes(int(self.shard[i]), int(self.sizes[i, part]), int(self._places[i, part]))

    def _bytes(self, shard: int, size: int, offset: int) -> bytes:
        if offset + size > self._stats[shard][0]:  # a saved index that came with the shards may claim anything
            raise Rejected("shard changed since indexing")
        file = self._files.get(shard)
        if file is None:
            file = self._open(shard)
        try:
            data = os.pread(file, size, offset)
            unchanged = self._unchanged(shard, file)
        except OSError:  # a network's file that went stale: the next read opens it anew
            with suppress(OSError):
                os.close(self._files.pop(shard))
            raise Rejected("shard unavailable") from None
        if len(data) != size or not unchanged:
            raise Rejected("shard changed since indexing")
        return data

    def _open(self, shard: int) -> int:
        if len(self._files) >= OPEN_FILES:
            os.close(self._files.pop(next(iter(self._files))))
        try:
            file = os.open(storage.local_path(self.shards[shard]), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            raise Rejected("shard unavailable") from None
        if not self._unchanged(shard, file):
            os.close(file)
            raise Rejected("shard changed since indexing")
        self._files[shard] = file
        return file

    def _unchanged(self, shard: int, file: int) -> bool:
        now = os.fstat(file)  # a quarter of a microsecond: cheap enough for every read
        return (now.st_size, now.st_mtime_ns) == self._stats[shard]

    def __getstate__(self) -> dict[str, Any]:
        state = {
            name: value
            for name, value in self.__dict__.items()
            if name not in ("ids", "image_ids", "shard", "sizes", "key_hashes", "_places")
        }
        state["_files"] = {}  # open files do not travel to another process
        if load_tables(self._saved, self.fingerprint) is not None:
            state["_tables"] = None  # the other process maps the file itself
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        tables = load_tables(self._saved, self.fingerprint) if self._tables is None else self._tables
        assert tables is not None
        self._set_tables(tables)

    def __del__(self) -> None:
        if os is not None:  # not at the end of the interpreter
            for file in getattr(self, "_files", {}).values():
                os.close(file)


def open_index(path: PathLike | Sequence[PathLike], *, skip_damaged: bool = False) -> ShardIndex:
    """The index of a folder of shards, one tar, a glob, a URL or a list of these; built and saved at the first use.

    skip_damaged: leave damaged shards out as a whole; the saved index remembers that, and which.

    Raises UserError when there are no shards, when some are damaged (all are named), or when none holds a pair.
    """
    shards = find_shards(path)
    folder, name = _place(path, shards)
    try:
        stats = np.array([storage.shard_stat(shard) for shard in shards], np.int64)
    except Rejected as fault:
        raise UserError(str(fault)) from None
    saved = folder / f"{name}.tables"
    found = _load(saved, shards, stats)
    if found is None:
        manifest, tables = _build(shards, stats, skip_damaged)
        try:
            save_tables(saved, manifest["fingerprint"], tables)
            _write_json(saved.with_suffix(".json"), manifest)
        except OSError as fault:  # a folder that cannot be written: the index lives in memory only
            if skip_damaged:
                raise UserError(
                    f"--skip-damaged: {saved} cannot be written ({fault.strerror}), and training would not know which "
                    "shards to leave out; copy the shards to a folder of your own"
                ) from None
    else:
        manifest, tables = found
    index = ShardIndex(shards, folder, manifest, tables, saved)
    if not len(index):
        found_instead = ", ".join(f"{count} with {reason}" for reason, count in index.rejected.items()) or "no member"
        others = ", ".join(map(ignored_reason, manifest["ignored"]))
        raise UserError(
            f"{path}: no pair in {len(shards)} shards ({found_instead}{f'; also members {others}' if others else ''}); "
            "a pair is key.jpg with key.txt, or with a caption in key.json"
        )
    return index


def _place(path: PathLike | Sequence[PathLike], shards: list[Shard]) -> tuple[Path, str]:
    """The folder that holds the saved index, and its name there without an extension."""
    if any(storage.is_remote(shard) for shard in shards):
        return storage.index_folder(shards), "index"
    folder = Path(shards[0]).parent
    if isinstance(path, str | os.PathLike) and Path(path).is_dir():
        return folder, "index"
    names = "\0".join(os.path.abspath(shard) for shard in shards).encode("utf-8", "surrogateescape")
    return folder, f"index-{hashlib.blake2b(names, digest_size=6).hexdigest()}"


def _build(shards: list[Shard], stats: np.ndarray, skip_damaged: bool) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Scan all shards: the manifest and the tables."""
    scans: list[Scan] = []
    damaged: dict[str, str] = {}
    for shard in shards:
        try:
            scans.append(scan_shard(storage.local_path(shard)))
        except DamagedShard as fault:
            damaged[_name(shard)] = fault.what
            scans.append(Scan())
        except Rejected as fault:
            raise UserError(str(fault)) from None
    if damaged and not skip_damaged:
        raise UserError(_tell(shards, damaged))
    rejected, renamed = unique_keys([_name(shard) for shard in shards], scans)
    rows = [(number, row) for number, scan in enumerate(scans) for row in scan.rows]
    keys = [row.key.encode("utf-8", "surrogateescape") for _, row in rows]
    tables: dict[str, np.ndarray] = {
        "shard": np.array([number for number, _ in rows], np.int32),
        "offsets": np.array([row.offsets for _, row in rows], np.int64).reshape(-1, 3),
        "sizes": np.array([row.sizes for _, row in rows], np.int64).reshape(-1, 3),
        "ids": np.array([row.caption_id for _, row in rows], np.int64),
        "image_ids": np.array([row.image_id for _, row in rows], np.int64),
        "key_hashes": np.array([_hash(key) for key in keys], np.uint64),
        "keys": np.frombuffer(b"".join(keys), np.uint8),
        "key_ends": np.cumsum([len(key) for key in keys], dtype=np.int64),
        "stats": stats,
    }
    described = [
        {"name": _name(shard), "bytes": scan.size, "sha256": scan.sha256, "pairs": len(scan.rows)}
        for shard, scan in zip(shards, scans, strict=True)
    ]
    manifest = {
        "version": VERSION,
        "fingerprint": _fingerprint(described, tables),
        "pairs": len(rows),
        "repeated_images": len(rows) - len(np.unique(tables["image_ids"])),
        "shards": described,
        "renamed": renamed,
        "damaged": damaged,
        "rejected": rejected,
        "ignored": dict(sorted(sum((scan.ignored for scan in scans), Counter[str]()).items())),
    }
    return manifest, tables


def _tell(shards: list[Shard], damaged: dict[str, str]) -> str:
    first = "; ".join(f"{name}: {what}" for name, what in list(damaged.items())[:5])
    more = f" and {len(damaged) - 5} more" if len(damaged) > 5 else ""
    folder = os.path.dirname(storage.redact(str(shards[0]))) or "."
    return (
        f"{len(damaged)} of {len(shards)} shards in {folder} cannot be used: "
        f"{first}{more}; write or copy them again, or leave them out with `contrastive check --skip-damaged`"
    )


def _hash(key: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")


def _name(shard: Shard) -> str:
    return storage.redact(str(shard)).rpartition("/")[2]


def _text(data: bytes) -> str:
    try:
        return caption_text(data)
    except UnicodeDecodeError:  # it was UTF-8 when it was indexed
        raise Rejected("shard changed since indexing") from None


def _variants(caption: str, meta: dict[str, Any]) -> tuple[str, ...]:
    captions = meta.get("captions")
    if not isinstance(captions, list):
        return ()
    return tuple(c for c in captions if isinstance(c, str) and c.strip() and c != caption and _fits(c))


def _fits(variant: str) -> bool:
    try:
        return len(variant.encode()) <= MAX_CAPTION_BYTES
    except UnicodeEncodeError:  # half of a surrogate pair, as JSON can spell one
        return False


def _fingerprint(shards: list[dict[str, Any]], tables: dict[str, np.ndarray]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for shard in shards:
        digest.update(f"{shard['name']}\0{shard['sha256']}\0".encode("utf-8", "surrogateescape"))
    for name, kind in (("shard", "<i4"), ("offsets", "<i8"), ("sizes", "<i8"), ("ids", "<i8"), ("keys", "u1")):
        digest.update(np.ascontiguousarray(tables[name], kind).tobytes())
    return digest.hexdigest()


def _load(saved: Path, shards: list[Shard], stats: np.ndarray) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """The saved index, if it is there, whole and of these shards as they are now."""
    try:
        manifest = json.loads(saved.with_suffix(".json").read_text(encoding="utf-8"))
        names = [shard["name"] for shard in manifest["shards"]]
        if manifest["version"] != VERSION or names != [_name(shard) for shard in shards]:
            return None
        tables = load_tables(saved, manifest["fingerprint"])
        known = {"pairs", "repeated_images", "renamed", "damaged", "rejected", "ignored"} <= manifest.keys()
        if tables is None or not known or not np.array_equal(tables["stats"], stats):
            return None
        rows = {
            len(tables[name]) for name in ("shard", "offsets", "sizes", "ids", "image_ids", "key_hashes", "key_ends")
        }
    except (OSError, ValueError, KeyError, TypeError):
        return None  # absent or damaged: it is built again
    return (manifest, tables) if rows == {manifest["pairs"]} else None


def _write_json(path: Path, value: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8", errors="surrogateescape")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

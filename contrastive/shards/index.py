"""Which pairs a set of tar shards holds, and where their bytes lie: a table to read any pair by.

The index is built once by reading every header, saved beside the shards, and rebuilt when a shard's name,
size or modification time changes.
"""

import glob
import hashlib
import json
import os
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from contrastive.errors import UserError
from contrastive.shards.record import IMAGE_EXTENSIONS, Record
from contrastive.shards.storage import local_path
from contrastive.shards.tar import Member, members

VERSION = 1
PathLike = str | os.PathLike[str]


class ShardIndex:
    """A random-access view of the pairs in a list of shards.

    ids: int64 (n,), equal where two captions are the same apart from case and white space.
    fingerprint: hexadecimal; the same for the same shards on every machine.
    rejected: counts of what the shards hold that is no pair, by reason.
    folder: where files that belong to the shards are kept.
    """

    def __init__(self, shards: list[Path], tables: dict[str, np.ndarray]) -> None:
        self.shards = shards
        self.folder = shards[0].parent
        self.ids: np.ndarray = tables["ids"]
        self.shard: np.ndarray = tables["shard"]
        self.shard_starts = np.searchsorted(self.shard, np.arange(len(shards) + 1)).astype(np.int64)
        self.fingerprint = _fingerprint(shards, tables)
        self.rejected: dict[str, int] = json.loads(str(tables["rejected"]))
        self._tables = tables
        self._files: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.ids)

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
        return self._read(i, 1).decode("utf-8").strip()

    def captions(self) -> Iterator[str]:
        """The first caption of every sample, in order (to train a tokenizer on)."""
        return (self.caption(i) for i in range(len(self)))

    def variants(self, i: int) -> tuple[str, ...]:
        """The captions of a sample besides the first."""
        return _variants(self.caption(i), self._json(i))

    def record(self, i: int) -> Record:
        """Everything that the shard holds of sample i."""
        meta = self._json(i)
        caption = self.caption(i)
        captions = (caption, *_variants(caption, meta))
        label = meta.pop("label", None)
        meta.pop("captions", None)
        return Record(
            self.key(i),
            self.image(i),
            captions,
            None if label is None else str(label),
            meta,
        )

    def _json(self, i: int) -> dict[str, Any]:
        data = self._read(i, 2)
        if not data:
            return {}
        try:
            value = json.loads(data)
        except ValueError:
            raise UserError(f"{self.shards[int(self._tables['shard'][i])]}: {self.key(i)}.json is no JSON") from None
        return value if isinstance(value, dict) else {}

    def _read(self, i: int, part: int) -> bytes:
        shard = int(self._tables["shard"][i])
        offset, size = (
            int(self._tables["offsets"][i, part]),
            int(self._tables["sizes"][i, part]),
        )
        if shard not in self._files:
            if len(self._files) >= 64:  # far below the usual limit of 1,024 open files
                os.close(self._files.pop(next(iter(self._files))))
            self._files[shard] = os.open(local_path(self.shards[shard]), os.O_RDONLY)
        data = os.pread(self._files[shard], size, offset)
        if len(data) != size:
            raise UserError(f"{self.shards[shard]}: shorter than when it was indexed, at byte {offset}")
        return data

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "_files": {},
        }  # open files do not travel to another process

    def __del__(self) -> None:
        for file in getattr(self, "_files", {}).values():
            os.close(file)


def open_index(path: PathLike | Sequence[PathLike]) -> ShardIndex:
    """The index of a folder of shards, one tar, a glob or a list of tars; built and saved at the first use.

    Raises UserError when there are no shards, when one is damaged, or when none holds a pair.
    """
    shards = find_shards(path)
    saved = shards[0].parent / _index_name(path, shards)
    stats = np.array([(s.stat().st_size, s.stat().st_mtime_ns) for s in shards], np.int64)
    tables = _load(saved, shards, stats)
    if tables is None:
        tables = {**_scan(shards), "version": np.array(VERSION), "stats": stats}
        tables["shards"] = np.array([s.name for s in shards])
        _save(saved, tables)
    index = ShardIndex(shards, tables)
    if not len(index):
        found = ", ".join(f"{count} with {reason}" for reason, count in index.rejected.items()) or "no member"
        raise UserError(f"{path}: no pair in {len(shards)} shards ({found}); a pair is key.jpg beside key.txt")
    return index


def find_shards(path: PathLike | Sequence[PathLike]) -> list[Path]:
    """The tar files that a folder, a file name, a glob or a list stands for, sorted by name."""
    if not isinstance(path, str | os.PathLike):
        found = [Path(p) for p in path]
    elif Path(path).is_dir():
        found = list(Path(path).glob("*.tar"))
    elif Path(path).exists():
        found = [Path(path)]
    else:
        found = [Path(p) for p in glob.glob(os.fspath(path))]
        if not found:
            raise UserError(f"{path}: no such file or folder")
    if not found:
        raise UserError(f"{path}: no .tar shard in this folder; make them with `contrastive shard SOURCE {path}`")
    for shard in found:
        if shard.suffix != ".tar":
            raise UserError(f"{shard}: not a .tar shard (compressed tars cannot be read by offset: unpack them first)")
        if not shard.exists():
            raise UserError(f"{shard}: no such shard")
    return sorted(found)


def caption_id(caption: str) -> int:
    """A 64-bit signed hash of a caption, blind to case, white space and Unicode spelling."""
    plain = " ".join(unicodedata.normalize("NFKC", caption).casefold().split())
    return int.from_bytes(hashlib.blake2b(plain.encode(), digest_size=8).digest(), "little", signed=True)


def _scan(shards: list[Path]) -> dict[str, np.ndarray]:
    """Read every header and every caption."""
    rows: list[tuple[int, tuple[int, int, int], tuple[int, int, int], int]] = []
    keys: list[bytes] = []
    rejected: Counter[str] = Counter()
    for number, shard in enumerate(shards):
        with open(shard, "rb") as file:
            for key, parts in _samples(shard):
                image, text, info = (parts.get(kind, Member("", 0, 0)) for kind in ("image", "txt", "json"))
                file.seek(text.offset)
                try:
                    caption = file.read(text.size).decode("utf-8").strip()
                except UnicodeDecodeError:
                    rejected["caption not UTF-8"] += 1
                    continue
                if not caption or not image.size:
                    rejected["no image" if caption else "no caption" if image.size else "neither"] += 1
                    continue
                keys.append(key.encode("utf-8", "surrogateescape"))
                offsets = (image.offset, text.offset, info.offset)
                rows.append(
                    (
                        number,
                        offsets,
                        (image.size, text.size, info.size),
                        caption_id(caption),
                    )
                )
    return {
        "shard": np.array([r[0] for r in rows], np.int32),
        "offsets": np.array([r[1] for r in rows], np.int64).reshape(-1, 3),
        "sizes": np.array([r[2] for r in rows], np.int64).reshape(-1, 3),
        "ids": np.array([r[3] for r in rows], np.int64),
        "keys": np.frombuffer(b"".join(keys), np.uint8),
        "key_ends": np.cumsum([len(k) for k in keys], dtype=np.int64),
        "rejected": np.array(json.dumps(dict(sorted(rejected.items())))),
    }


def _samples(shard: Path) -> Iterator[tuple[str, dict[str, Member]]]:
    """Consecutive members with one key are one sample, as in webdataset: the key ends at the first dot."""
    current, parts = "", dict[str, Member]()
    for member in members(shard):
        folder, _, base = member.name.rpartition("/")
        stem, dot, extension = base.partition(".")
        if not stem or not dot:
            continue
        key = f"{folder}/{stem}" if folder else stem
        if key != current:
            if parts:
                yield current, parts
            current, parts = key, {}
        extension = extension.lower()
        kind = "image" if extension in IMAGE_EXTENSIONS else extension
        if kind in parts:
            raise UserError(f"{shard}: sample '{key}' has two members .{extension}; give every sample its own key")
        parts[kind] = member
    if parts:
        yield current, parts


def _variants(caption: str, meta: dict[str, Any]) -> tuple[str, ...]:
    captions = meta.get("captions")
    if not isinstance(captions, list):
        return ()
    return tuple(c for c in captions if isinstance(c, str) and c.strip() and c != caption)


def _fingerprint(shards: list[Path], tables: dict[str, np.ndarray]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    digest.update("\0".join(s.name for s in shards).encode("utf-8", "surrogateescape"))
    for name, kind in (
        ("shard", "<i4"),
        ("offsets", "<i8"),
        ("sizes", "<i8"),
        ("ids", "<i8"),
        ("keys", "u1"),
    ):
        digest.update(np.ascontiguousarray(tables[name], kind).tobytes())
    return digest.hexdigest()


def _index_name(path: PathLike | Sequence[PathLike], shards: list[Path]) -> str:
    if isinstance(path, str | os.PathLike) and Path(path).is_dir():
        return "index.npz"
    names = "\0".join(os.path.abspath(s) for s in shards).encode("utf-8", "surrogateescape")
    return f"index-{hashlib.blake2b(names, digest_size=6).hexdigest()}.npz"


def _load(saved: Path, shards: list[Path], stats: np.ndarray) -> dict[str, np.ndarray] | None:
    try:
        with np.load(saved, allow_pickle=False) as file:
            tables = dict(file)
        same = (
            int(tables["version"]) == VERSION
            and tables["shards"].tolist() == [s.name for s in shards]
            and np.array_equal(tables["stats"], stats)
        )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # absent or damaged: it is rebuilt
    return tables if same else None


def _save(saved: Path, tables: dict[str, np.ndarray]) -> None:
    temporary = saved.with_name(f".{saved.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, allow_pickle=False, **tables)
        os.replace(temporary, saved)
    except OSError:  # a read-only folder: the index lives in memory only
        temporary.unlink(missing_ok=True)

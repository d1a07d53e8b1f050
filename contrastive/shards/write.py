"""Writing pairs as tar shards in the layout of webdataset: key.webp, key.txt, key.json."""

import io
import json
import os
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from contrastive.errors import UserError
from contrastive.shards.index import PathLike, caption_id
from contrastive.shards.record import (
    IMAGE_EXTENSIONS,
    MAX_CAPTION_BYTES,
    MAX_IMAGE_BYTES,
    MAX_TEXT_BYTES,
    Record,
    image_extension,
)

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """What was written: pairs, names of the shards, rows left out by reason, pairs that repeat a caption."""

    pairs: int
    shards: list[str]
    skipped: dict[str, int]
    duplicate_captions: int


def write_shards(
    source: Iterable[Record],
    dest: PathLike,
    *,
    samples_per_shard: int = 1000,
    overwrite: bool = False,
) -> Manifest:
    """Write the records that have an image and a caption, in order, to the folder `dest`.

    The bytes written depend on the records only. Everything goes to a temporary folder beside `dest`, which
    is renamed when it is complete. Image bytes are stored untouched, under the extension of their real
    format.

    Raises UserError: `dest` is in use (unless `overwrite`, which replaces shards and nothing else), a key
    occurs twice, or no row is a pair.
    """
    if samples_per_shard < 1:
        raise UserError(f"samples_per_shard {samples_per_shard}: give at least 1")
    dest = Path(os.path.abspath(dest))
    check_free(dest, overwrite)
    dest.parent.mkdir(parents=True, exist_ok=True)
    temporary = dest.with_name(f".{dest.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        manifest = _write(source, temporary, samples_per_shard)
        (temporary / MANIFEST).write_text(json.dumps(asdict(manifest), indent=1) + "\n", encoding="utf-8")
        swap(temporary, dest)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest


def swap(complete: Path, dest: Path) -> None:
    """Let the folder `complete` take the place of `dest`, if there is one.

    Killed between the two renames, the old folder is left as `.NAME.old`, and no half-made one.
    """
    old = dest.with_name(f".{dest.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if dest.exists():
        os.replace(dest, old)
    os.replace(complete, dest)
    shutil.rmtree(old, ignore_errors=True)


def _write(source: Iterable[Record], folder: Path, samples_per_shard: int) -> Manifest:
    skipped: Counter[str] = Counter()
    keys: set[str] = set()
    captions: set[int] = set()
    shards: list[str] = []
    tar: tarfile.TarFile | None = None
    try:
        for record in source:
            reason = fault_of(record)
            if reason:
                skipped[reason] += 1
                continue
            key = safe_key(record.key)
            if key in keys:
                raise UserError(f"key '{key}' occurs twice; give every pair a key of its own")
            if len(keys) % samples_per_shard == 0:
                if tar is not None:
                    tar.close()
                shards.append(f"{len(shards):05d}.tar")
                tar = tarfile.open(folder / shards[-1], "w", format=tarfile.GNU_FORMAT)
            keys.add(key)
            captions.add(caption_id(record.captions[0]))
            assert tar is not None
            add_pair(tar, key, record)
    finally:
        if tar is not None:
            tar.close()
    if not keys:
        raise nothing_to_write(skipped, getattr(source, "columns", []))
    return Manifest(len(keys), shards, dict(sorted(skipped.items())), len(keys) - len(captions))


def nothing_to_write(skipped: Mapping[str, int], columns: Sequence[str]) -> UserError:
    """The error for a source without any pair; `columns` are those of a table."""
    found = ", ".join(f"{count} with {reason}" for reason, count in skipped.items()) or "no rows"
    remedy = f"name the columns with --image and --caption; columns: {', '.join(columns)}"
    if not columns:
        remedy = "every image needs a caption, as a .txt file of the same name"
    return UserError(f"nothing to write: {found}; {remedy}")


def fault_of(record: Record) -> str | None:
    """Why a record is no pair, told without decoding anything; None for a pair."""
    if record.fault:
        return record.fault
    if not record.image:
        return "no image"
    if len(record.image) > MAX_IMAGE_BYTES:
        return "image too large"
    if image_extension(record.image) is None:
        return "unknown image format"
    if not record.captions or not record.captions[0].strip():
        return "no caption"
    sizes = [len(caption.encode("utf-8", "surrogatepass")) for caption in record.captions]
    if sizes[0] > MAX_CAPTION_BYTES or sum(sizes) > MAX_TEXT_BYTES:
        return "text too long"
    try:
        "".join(record.captions).encode()
    except UnicodeEncodeError:  # half of a surrogate pair, as JSON can spell one
        return "caption not UTF-8"
    return None


def add_pair(tar: tarfile.TarFile, key: str, record: Record) -> None:
    """Add the three members of a pair, which `fault_of` found to be one."""
    assert record.image is not None
    info = {**record.meta, "captions": list(record.captions)}
    if record.label is not None:
        info["label"] = record.label
    _add(tar, f"{key}.{image_extension(record.image)}", record.image)
    _add(tar, f"{key}.txt", record.captions[0].encode())
    _add(tar, f"{key}.json", json.dumps(info, ensure_ascii=False, sort_keys=True).encode("utf-8", "replace"))


def safe_key(key: str) -> str:
    """The layout ends a key at the first dot; a name must not leave the folder that a tar is unpacked in."""
    stem, dot, extension = key.rpartition(".")
    key = stem if dot and extension.lower() in IMAGE_EXTENSIONS else key
    return re.sub(r"[.\\\x00-\x1f]", "_", key).strip("/") or "_"


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # its defaults: time 0, user and group 0, mode 644
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def check_free(dest: Path, overwrite: bool) -> None:
    """Raise UserError unless `dest` can be written: absent, empty, or (with `overwrite`) holding shards only."""
    if not dest.exists():
        return
    if not dest.is_dir():
        raise UserError(f"{dest}: is a file; give a folder")
    names = [p.name for p in dest.iterdir()]
    if not names:
        return
    if not overwrite:
        raise UserError(f"{dest}: the folder is not empty; give another, or --overwrite")
    ours = re.compile(
        r"\d{5,}\.tar|manifest\.json|\.?index(-[0-9a-f]+)?\.(npz|tables|json).*|\.?pixels-[0-9a-f]{16}\.(npy|json).*"
    )
    foreign = [name for name in sorted(names) if not ours.fullmatch(name)]
    if foreign:
        raise UserError(f"{dest}: holds '{foreign[0]}', which is no shard; nothing was overwritten")

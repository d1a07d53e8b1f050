"""Writes pairs as tar shards in the layout of webdataset: key.webp, key.txt, key.json."""

import io
import json
import os
import re
import shutil
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

from contrastive.errors import UserError
from contrastive.shards.decode import missing_decoder
from contrastive.shards.record import MAX_CAPTION_BYTES, MAX_IMAGE_BYTES, MAX_TEXT_BYTES, Record, image_extension
from contrastive.shards.skipped import REJECTED, Skip

MANIFEST = "manifest.json"
MAX_KEY = 1000  # characters; the index refuses a shard with names above 4,096


@dataclass(frozen=True)
class Manifest:
    """The contents of a finished folder.

    pairs: their number. shards: names of the files. skipped: counts by reason, of rows and of what the source left
    out itself. duplicate_captions: pairs that repeat a caption. notes: lines for the user on changed keys.
    """

    pairs: int
    shards: list[str]
    skipped: dict[str, int]
    duplicate_captions: int
    notes: list[str] = field(default_factory=list)


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


def fault_of(record: Record) -> Skip | None:
    """The reason why a record is no pair, found without decoding; None for a pair."""
    if record.fault:
        return Skip(record.fault, record.detail)
    if not record.image:
        return Skip("no image")
    if len(record.image) > MAX_IMAGE_BYTES:
        return Skip("image too large", f"{len(record.image):,} bytes; at most {MAX_IMAGE_BYTES:,}")
    extension = image_extension(record.image)
    if extension is None:
        return Skip("unknown image format", f"begins with {record.image[:16]!r}")
    if missing := missing_decoder(extension):
        return Skip(missing)
    if not record.captions or not record.captions[0].strip():
        return Skip("no caption")
    sizes = [len(caption.encode("utf-8", "surrogatepass")) for caption in record.captions]
    if sizes[0] > MAX_CAPTION_BYTES or sum(sizes) > MAX_TEXT_BYTES:
        return Skip("text too long", f"caption of {sizes[0]:,} bytes, all captions {sum(sizes):,}")
    if len(record.key) > MAX_KEY:
        return Skip("key too long", f"{len(record.key):,} characters; at most {MAX_KEY:,}")
    try:
        "".join(record.captions).encode()
    except UnicodeEncodeError:  # half of a surrogate pair, as JSON can spell one
        return Skip("caption not UTF-8")
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


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # its defaults: time 0, user and group 0, mode 644
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def check_writable(dest: Path) -> None:
    """Raise UserError where the folder `dest` cannot be made: before the work, not after it."""
    if os.path.lexists(dest) and not dest.is_dir():
        raise UserError(f"{dest}: is a file; give a folder")
    parent = next((folder for folder in dest.absolute().parents if os.path.lexists(folder)), dest)
    if not parent.is_dir():
        raise UserError(f"{dest}: {parent} is no folder; give another place")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{dest}: {parent} cannot be written; give another place")


def check_free(dest: Path, overwrite: bool) -> None:
    """Raise UserError unless `dest` can be written: absent, empty, or (with `overwrite`) holding shards only."""
    check_writable(dest)
    if not dest.exists():
        return
    names = [p.name for p in dest.iterdir()]
    if not names:
        return
    if not overwrite:
        raise UserError(f"{dest}: the folder is not empty; give another, or --overwrite")
    ours = re.compile(
        rf"\d{{5,}}\.tar|manifest\.json|{re.escape(REJECTED)}|"
        r"\.?index(-[0-9a-f]+)?\.(npz|tables|json).*|\.?pixels-[0-9a-f]{16}(-\d+)?\.(npy|json).*"
    )
    foreign = [name for name in sorted(names) if not ours.fullmatch(name)]
    if foreign:
        raise UserError(f"{dest}: holds '{foreign[0]}', which is no shard; nothing was overwritten")

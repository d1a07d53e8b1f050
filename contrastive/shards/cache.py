"""Decoded pixels of every sample on disk, for small images of one size: reading replaces decoding."""

import json
import os
from pathlib import Path

import numpy as np

from contrastive.errors import UserError
from contrastive.shards.decode import DECODER_VERSION, decode_image, outdated
from contrastive.shards.index import ShardIndex
from contrastive.shards.record import Rejected


class PixelCache:
    """pixels: uint8 (n, height, width, 3), memory-mapped. rejected: sample → why it has no pixels."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # A plain view: indexing a np.memmap costs several times as much.
        self.pixels = np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
        self.rejected = {int(i): reason for i, reason in json.loads(_sidecar(path).read_text()).items()}

    def __getstate__(self) -> dict[str, Path]:
        return {"path": self.path}  # a worker maps the file itself

    def __setstate__(self, state: dict[str, Path]) -> None:
        self.__init__(state["path"])  # type: ignore[misc]


def open_cache(index: ShardIndex) -> PixelCache:
    """The decoded pixels of an index, built at the first use in the folder of the shards.

    The name holds the index's fingerprint, which covers the bytes of the images, and DECODER_VERSION. Files of earlier
    decoders are deleted once new ones are there: nothing reads them any more.

    Raises UserError when the images differ in size, or when the folder cannot be written.
    """
    stem = f"pixels-{index.fingerprint[:16]}"
    path = index.folder / f"{stem}-{DECODER_VERSION}.npy"
    if path.exists() and _sidecar(path).exists():
        found = PixelCache(path)
        if not outdated(found.rejected.values()):
            return found
    _build(index, path)
    for version in ("", *(f"-{earlier}" for earlier in range(2, DECODER_VERSION))):
        for old in (index.folder / f"{stem}{version}.npy", index.folder / f"{stem}{version}.json"):
            old.unlink(missing_ok=True)
    return PixelCache(path)


def _build(index: ShardIndex, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    pixels: np.ndarray | None = None
    rejected: dict[int, str] = {}
    try:
        for i in range(len(index)):
            try:
                data = index.image(i)
            except Rejected as fault:  # a fault that may pass is nothing to keep
                raise UserError(f"data.cache: {index.key(i)}: {fault.reason}; start again") from None
            try:
                image = np.asarray(decode_image(data))
            except Rejected as fault:
                rejected[i] = fault.reason
                continue
            if pixels is None:
                shape = (len(index), *image.shape)
                pixels = np.lib.format.open_memmap(temporary, "w+", np.uint8, shape)
            if image.shape != pixels.shape[1:]:
                first, other = (f"{s[1]}x{s[0]}" for s in (pixels.shape[1:], image.shape))
                raise UserError(
                    f"data.cache: images differ in size ({first}, {other} at {index.key(i)}); set it to none"
                )
            pixels[i] = image
        if pixels is None:
            raise UserError(f"{index.folder}: no image can be decoded ({', '.join(sorted(set(rejected.values())))})")
        pixels.flush()  # type: ignore[attr-defined]
        sidecar = temporary.with_name(f"{temporary.name}.json")
        sidecar.write_text(json.dumps(rejected))
        os.replace(sidecar, _sidecar(path))
        os.replace(temporary, path)  # last: its presence says that the cache is whole
    except OSError as fault:
        raise UserError(f"data.cache: cannot write {path} ({fault.strerror}); set it to none") from fault
    finally:
        temporary.unlink(missing_ok=True)


def _sidecar(path: Path) -> Path:
    return path.with_suffix(".json")

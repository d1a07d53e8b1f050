"""Features of a whole training set, made once and kept on disk: data-set reinforcement (MobileCLIP, arXiv:2311.17049).

A store holds one folder for each (weights, preprocessing, tokenizer, kind of features, data set), named by a hash of
all of them; the data's part is the fingerprint of its shards, which covers every byte. So other weights or other data
find another folder, and what is found need not be compared with anything. In a folder:

``image.npy``, ``text.npy``: float32, a row for each sample of the data by its number
``whole.json``: what the features are of, which samples have none and why, and the sizes of the files. Written last.
``filling/``: parts that are done, while the folder is not whole (see `stored`); a killed run goes on from there.
``lock``: held by the run that looks or fills.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from contrastive.errors import UserError
from contrastive.evaluation.embed import embed
from contrastive.evaluation.stored import (
    gathered,
    model_hash,
    preprocessing_hash,
    rank_and_world,
    together,
    write_json,
    write_rows,
)
from contrastive.shards import Mixture
from contrastive.shards.decode import DECODER_VERSION, outdated

FORMAT = 1
KINDS = ("image", "text")
BLOCK = 1 << 16  # rows that are copied at a time
Progress = Callable[[int, int], None]


class StoredFeatures(NamedTuple):
    """image, text: float32 (samples, F), memory-mapped. rejected: sample → why it has none; its rows are zero."""

    image: NDArray[np.float32]
    text: NDArray[np.float32]
    rejected: dict[int, str]


def stored_features(
    model: Any,
    data: Mixture,
    store: Path,
    *,
    features: str,
    name: str,
    say: Callable[[str], None],
    progress: Progress | None = None,
) -> StoredFeatures:
    """The features of every image and first caption of `data`, from the store or, where it has none, put there first.

    All ranks of the process group call it alike. Each makes its share, and the main one puts them together; the store
    is on a disk that all of them see. Of two runs that want the same features at once, one makes them.

    Args:
        model: a `TwoTower`, on its device.
        features: "projected" or "tower", see `embed`.
        name: of the model, for `whole.json` and for the user.
        say: is called, on every rank, with a line on where the features come from.

    Raises:
        UserError: the store cannot be written, or is not seen by all ranks; no image of a set can be read.
    """
    with together():
        identity = {
            "format": FORMAT,
            "model": _towers_hash(model),
            "features": features,
            "data": data.fingerprint,
            "decoder": DECODER_VERSION,
        }
    folder = store / hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=16).hexdigest()
    rank = rank_and_world()[0]
    with together():
        if rank == 0:
            with suppress(OSError):  # every rank will see that it is not there
                folder.mkdir(parents=True, exist_ok=True)
    with together():
        if not folder.is_dir():
            raise UserError(
                f"data.features: {folder} cannot be made, or process {rank} does not see it; choose another"
            )
    try:
        with ExitStack() as held:
            with together():
                if rank == 0:
                    held.enter_context(_alone(folder / "lock", say))
            found = _open(folder, len(data))
            _check_alike(found is not None, folder)  # and nobody writes before all have looked
            if found is not None:
                say(f"features of {name} on {len(data):,} pairs are in {folder}")
            else:
                say(f"running {name} once over {len(data):,} pairs; the features stay in {folder}")
                _fill(folder, model, data, features, {**identity, "name": name}, progress)
                found = _open(folder, len(data))
                _check_alike(found is not None, folder)
    except OSError as fault:
        told = fault.strerror or fault
        raise UserError(f"data.features: cannot write {folder} ({told}); choose another folder") from fault
    if found is None:
        raise UserError(f"data.features: {folder} cannot be read again; choose another folder")
    return found


def _check_alike(found: bool, folder: Path) -> None:
    """Raise UserError on all ranks where one finds the features in the store and another does not."""
    everyones = gathered(found)
    if len(set(everyones)) > 1:
        missing = everyones.index(False)
        raise UserError(f"data.features: process {missing} does not find all of {folder}; choose another folder")


def _fill(
    folder: Path, model: Any, data: Mixture, features: str, identity: dict[str, Any], progress: Progress | None
) -> None:
    main = rank_and_world()[0] == 0
    rejected: dict[int, str] = {}
    for number, (part, offset) in enumerate(zip(data.parts, data.offsets.tolist(), strict=False)):
        found = embed(model, part, features=features, cache=folder / "filling" / str(number), progress=progress)
        assert found.text is not None, "the index holds no sample without a caption"
        reasons = {i: one.reason for i, one in enumerate(found.outcomes) if one.reason is not None}
        rejected |= {offset + i: reason for i, reason in reasons.items()}
        read = np.array([i not in reasons for i in range(len(part))])
        assert read.sum() == len(found.keys)
        with together():  # the main one may find the disk full
            if main:
                for kind, rows in zip(KINDS, (found.image, found.text), strict=True):
                    _put_in_place(folder / f".{kind}.npy", rows, read, offset, len(data))
    with together():
        if main:
            for kind in KINDS:
                os.replace(folder / f".{kind}.npy", folder / f"{kind}.npy")
            sizes = {kind: (folder / f"{kind}.npy").stat().st_size for kind in KINDS}
            write_json(folder / "whole.json", {**identity, "bytes": sizes, "rejected": rejected}, indent=2)
            shutil.rmtree(folder / "filling", ignore_errors=True)  # a network's disk keeps what is open


def _put_in_place(file: Path, rows: NDArray[np.float32], read_S: NDArray[np.bool_], offset: int, samples: int) -> None:
    """Write the rows of one set's samples, those that could be read, from row `offset` on; zeros for the others."""
    row_S = np.cumsum(read_S) - 1
    for start in range(0, len(read_S), BLOCK):
        read = read_S[start : start + BLOCK]
        block = np.zeros((len(read), rows.shape[1]), np.float32)
        block[read] = rows[row_S[start : start + BLOCK][read]]
        write_rows(file, samples, offset + start, block)


def _open(folder: Path, samples: int) -> StoredFeatures | None:
    """What lies in a folder, if it is whole."""
    try:
        whole = json.loads((folder / "whole.json").read_text(encoding="utf-8"))
        files = [folder / f"{kind}.npy" for kind in KINDS]
        if [file.stat().st_size for file in files] != [whole["bytes"][kind] for kind in KINDS]:
            return None
        # Copy-on-write: torch takes the memory without a warning. A plain view: indexing a np.memmap takes longer.
        image, text = (np.load(file, mmap_mode="c", allow_pickle=False).view(np.ndarray) for file in files)
        rejected = {int(sample): reason for sample, reason in whole["rejected"].items()}
    except (OSError, ValueError, KeyError):
        return None
    if len(image) != samples or len(text) != samples or outdated(rejected.values()):
        return None
    return StoredFeatures(image, text, rejected)


@contextmanager
def _alone(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Keep other runs out, by a lock of this process that ends with it, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another run that is filling {path.parent}")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            pass
        yield


def _towers_hash(model: Any) -> list[str]:
    """Changes with every weight, with the preprocessing and with the tokenizer; not with the model's name."""
    with tempfile.TemporaryDirectory() as folder:
        digest = hashlib.blake2b(json.dumps(model.tokenizer.save(Path(folder))).encode(), digest_size=16)
        for file in sorted(Path(folder).iterdir()):
            digest.update(file.read_bytes())
    return [model_hash(model.image), model_hash(model.text), preprocessing_hash(model), digest.hexdigest()]

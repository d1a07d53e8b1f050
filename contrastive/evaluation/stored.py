"""Embeddings on disk: made once, resumed where a run was killed, read again only for the same model and the same data.

A cache folder holds one folder for each (model, preprocessing, precision, options, source). In it every array is one
`.npy` file with a row for each item of the source, and `parts/` has one small file for each 1,024 items, written
after their rows: it holds the hash of the items (keys, labels, captions and the bytes of every image) and what became
of each. A part whose hash is not that of the items at hand is made again, so stale rows are never read. Items are
numbered, parts are contiguous, and each rank takes a contiguous slice of the parts: nothing is padded, and the number
of ranks may change between a killed run and its continuation.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from PIL import Image

from contrastive.errors import Fault, UserError
from contrastive.evaluation.embed import (
    Embeddings,
    Progress,
    assemble,
    caption_rows,
    encode_texts,
    extract_items,
    on_images,
)
from contrastive.evaluation.items import Images, Outcome, class_label, content_hash, open_images, read_item
from contrastive.evaluation.protocol import Model
from contrastive.printable import printable
from contrastive.shards import Record, Source
from contrastive.shards.decode import DECODER_VERSION, outdated

FORMAT = 1
PART = 1024  # items: what a killed run may lose, and the bytes of so many images are held at a time
PLAIN = (bool, int, float, str, type(None))


def embed_stored(
    model: Model,
    source: Images,
    cache: str | os.PathLike[str],
    *,
    features: str,
    text: bool | str,
    batch_size: int,
    workers: int,
    invert: bool,
    dtype: torch.dtype | None,
    progress: Progress | None,
) -> Embeddings:
    """See `embed`: the same rows, kept in the folder `cache`, from all ranks of the process group."""
    records = open_images(source)
    total, parts = _cut(records)
    identity = {
        "format": FORMAT,
        "model": model_hash(model),
        "preprocessing": preprocessing_hash(model),
        "decoder": DECODER_VERSION,
        "dtype": str(dtype),
        "features": features,
        "invert": invert,
    }
    named = source.name if isinstance(source, Source) else source
    name = os.path.abspath(named) if named and isinstance(named, (str, os.PathLike)) else type(source).__name__
    place = {"source": name, "items": total}
    folder = Path(cache) / _digest(json.dumps(identity | place, sort_keys=True).encode())
    make = {"image": on_images(model, features)}
    first, last = _slice(len(parts))
    with together():
        (folder / "parts").mkdir(parents=True, exist_ok=True)
        for part in range(first, last):
            start = part * PART
            items = [read_item(start + offset, item) for offset, item in enumerate(parts[part])]
            if len(items) != min(PART, total - start):
                raise UserError(f"{source}: its number of rows changed while it was read; try again")
            content = _digest(*(content_hash(*item) for item in items))
            file = folder / "parts" / f"image-{part:06d}.json"
            known = _part(file)
            stale = known.get("content") != content or outdated(item[3] for item in known["items"] if item[3])
            if stale or not (folder / "image.npy").exists():
                file.unlink(missing_ok=True)  # before its rows change
                seen = extract_items(model, items, make, batch_size, workers, invert, dtype, None, total)
                reasons = [outcome.reason for outcome in seen.outcomes]
                read = np.array([reason is None for reason in reasons])
                for kind, rows in seen.features.items():
                    whole = np.zeros((len(items), *rows.shape[1:]), rows.dtype)
                    whole[read] = rows
                    write_rows(folder / f"{kind}.npy", total, start, whole)
                made_of = [(r.key, r.label, r.captions, why) for (r, _), why in zip(items, reasons, strict=True)]
                write_json(file, {"content": content, "items": made_of})
            if progress is not None:
                progress(min(start + PART, last * PART, total), total)

    with together():
        found = [_part(folder / "parts" / f"image-{part:06d}.json") for part in range(len(parts))]
        if not all(found):
            raise UserError(
                f"cache: process {rank_and_world()[0]} does not find all of {folder}; choose another folder"
            )
    every = [item for part in found for item in part["items"]]
    kept = [
        Record(printable(key), None, tuple(captions), class_label(label))
        for key, label, captions, reason in every
        if reason is None
    ]
    outcomes = [Outcome(printable(key), reason, name=printable(key)) for key, _, _, reason in every]
    failures = {one.key: one.reason for one in outcomes if one.reason is not None}
    read = np.array([reason is None for *_, reason in every], dtype=bool)
    content = _digest(*(part["content"].encode() for part in found))
    if not kept:
        return assemble(
            [], failures, {"image": np.zeros((0, model.dim), np.float32)}, {}, [], np.zeros(0, int), content, outcomes
        )

    texts, owners_T = caption_rows(kept, text)
    with together():
        text_files = _texts(model, folder, texts, features, batch_size, dtype)
    with together():
        of_image = {kind: _rows(folder / f"{kind}.npy", read) for kind in _kinds(folder, features)}
        of_text = {kind: _mapped(file) for kind, file in text_files.items()}
        if rank_and_world()[0] == 0:
            summary = {
                **identity,
                **place,
                "content": content,
                "rows": len(kept),
                "texts": len(texts),
                "failures": failures,
            }
            write_json(folder / "summary.json", summary, indent=2)
    return assemble(kept, failures, of_image, of_text, texts, owners_T, content, outcomes)


def model_hash(model: Model) -> str:
    """A hash of every weight and buffer, and of the plain settings (numbers, texts) of every module."""
    digest = hashlib.blake2b(digest_size=16)
    for name, module in model.named_modules():
        settings = {key: value for key, value in vars(module).items() if key != "training" and key[0] != "_"}
        plain = {key: value for key, value in settings.items() if _is_plain(value)}
        digest.update(repr((name, type(module).__qualname__, sorted(plain.items()))).encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(data.tobytes())
    return digest.hexdigest()


def preprocessing_hash(model: Model) -> str:
    """A hash of the model's `preprocessing`, where it has one, and of what `preprocess` makes of two pictures.

    One is wide, one is tall, and both hold every brightness.
    """
    own = getattr(model, "preprocessing", None)
    made = [] if own is None else [json.dumps(own.to_dict(), sort_keys=True).encode()]
    for width, height in ((150, 97), (61, 83)):
        rows, columns = np.mgrid[:height, :width]
        picture = np.stack([rows * 3 + columns, rows * columns, (rows // 5 + columns // 7) % 2 * 255], axis=2)
        made.append(model.preprocess(Image.fromarray((picture % 256).astype(np.uint8))).cpu().numpy().tobytes())
    return _digest(*made)


def _texts(
    model: Model, folder: Path, texts: list[str], features: str, batch_size: int, dtype: torch.dtype | None
) -> dict[str, Path]:
    """The rows of all captions, in files by kind, in parts as images are; a part's hash covers texts and tokens."""
    if not texts:
        return {}
    kinds = ("text", "text_tower") if features == "both" else ("text",)
    files = {kind: folder / f"{kind}-{len(texts)}.npy" for kind in kinds}
    first, last = _slice(-(-len(texts) // PART))
    for part in range(first, last):
        start = part * PART
        chosen = texts[start : start + PART]
        content = _digest(json.dumps(chosen).encode(), model.tokenize(chosen).cpu().numpy().tobytes())
        file = folder / "parts" / f"text-{len(texts)}-{part:06d}.json"
        if _part(file).get("content") == content:
            continue
        file.unlink(missing_ok=True)
        made = encode_texts(model, chosen, batch_size=batch_size, features=features, dtype=dtype)
        for kind, rows in made.items():
            write_rows(files[kind], len(texts), start, rows)
        write_json(file, {"content": content})
    return files


def _cut(records: Any) -> tuple[int, list[Iterable[Any]]]:
    """The number of items, and the items in parts, none of which is read yet."""
    if isinstance(records, Source):
        cut = records.cut(PART)
        return sum(part.records for part in cut), [records.read(part) for part in cut]
    return len(records), [records[start : start + PART] for start in range(0, len(records), PART)]


def _kinds(folder: Path, features: str) -> Iterator[str]:
    names = ("image", "image_tower", "looks") if features == "both" else ("image",)
    return (name for name in names if (folder / f"{name}.npy").exists())


def _rows(file: Path, read_N: NDArray[np.bool_]) -> NDArray[Any]:
    """The rows of what could be read: memory-mapped as they are, or copied where some have to be left out.

    Copy-on-write ("c"): torch takes the memory without a warning, and nothing that is written reaches the file.
    """
    rows = _mapped(file)
    return rows if read_N.all() else rows[read_N]


def _mapped(file: Path) -> NDArray[Any]:
    """Raises UserError for a file that was cut off or written over: what its parts say of it is not true any more."""
    try:
        rows: NDArray[Any] = np.load(file, mmap_mode="c")
    except (OSError, ValueError, EOFError):
        raise UserError(f"cache: {file} is damaged; delete {file.parent} to have it made again") from None
    return rows


def write_rows(file: Path, total: int, start: int, rows: NDArray[Any]) -> None:
    """Put rows into their place of a `.npy` file of `total` rows, which is made where it is not there.

    Ranks write at the same time, each its own bytes; the header is the same from all of them.
    """
    rows = np.ascontiguousarray(rows)
    head = io.BytesIO()
    layout = {"descr": np.lib.format.dtype_to_descr(rows.dtype), "fortran_order": False}
    np.lib.format.write_array_header_1_0(head, {**layout, "shape": (total, *rows.shape[1:])})
    header = head.getvalue()
    width = rows.nbytes // len(rows)
    handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        os.ftruncate(handle, len(header) + total * width)
        _put(handle, header, 0)
        _put(handle, rows.tobytes(), len(header) + start * width)
        os.fsync(handle)  # the part's file, which vouches for the rows, comes after them
    finally:
        os.close(handle)


def _put(handle: int, data: bytes, at: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(handle, view, at)
        view, at = view[written:], at + written


def write_json(file: Path, value: Any, indent: int | None = None) -> None:
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(value, indent=indent), encoding="utf-8")
    os.replace(unfinished, file)


def _part(file: Path) -> dict[str, Any]:
    """What a part's file says; nothing where there is none, or a cut-off one."""
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def _slice(parts: int) -> tuple[int, int]:
    rank, world = rank_and_world()
    return rank * parts // world, (rank + 1) * parts // world


def rank_and_world() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@contextmanager
def together() -> Iterator[None]:
    """A block that all ranks leave together, behind an error of one of them all with an error: nobody waits in vain.

    Raises:
        Exception: the block's own, and on the others one like that of the first rank that had one.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    for fault in (own, *gathered(own and _plain(own))):
        if fault is not None:
            raise fault


def gathered(own: Any) -> list[Any]:
    """What every rank has, by rank."""
    world = rank_and_world()[1]
    everyones = [own] * world
    if world > 1:
        dist.all_gather_object(everyones, own)
    return everyones


def _plain(error: Exception) -> Exception:
    """An error that tells the same, of a class that can be sent: not every exception can."""
    if isinstance(error, UserError):
        return Fault(str(error)) if isinstance(error, Fault) else UserError(str(error))
    if isinstance(error, OSError):
        return OSError(error.errno, error.strerror or str(error), error.filename)
    return RuntimeError(repr(error))


def _digest(*parts: bytes) -> str:
    return hashlib.blake2b(b"".join(parts), digest_size=16).hexdigest()


def _is_plain(value: Any) -> bool:
    return isinstance(value, PLAIN) or (isinstance(value, tuple) and all(isinstance(one, PLAIN) for one in value))

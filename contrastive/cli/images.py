"""The images of `classify` and `probe predict`: whatever the command line names, as one source."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from contrastive.errors import UserError
from contrastive.shards import open_source
from contrastive.shards.listing import is_image
from contrastive.shards.paths import refuse_no_path, shortened
from contrastive.shards.record import IMAGE_EXTENSIONS


def open_arguments(images: Sequence[str], model: str, *, split: str | None = None) -> Any:
    """The images as `embed` takes them: a source, or a list of files, with keys as they were typed.

    One folder, table, set of shards or pattern is a source of its own; every row of a table is an item. Several
    arguments are image files, patterns and folders of images. split: of one folder or table that holds several.

    Raises `UserError` for what is none of these (a URL, a data URI, standard input, a model), with the remedy.
    """
    for one in images:
        _check(one, model)
    if len(images) > 1 and split is not None:
        raise UserError(f"--split {split}: several images are named; name one folder or table that holds splits")
    if len(images) > 1:
        return Several(images)
    found = [images[0]] if os.path.lexists(images[0]) else sorted(glob.glob(images[0], recursive=True))
    if split is None and found and all(_is_picture(file) for file in found):
        return found  # as a shell lists them
    return open_source(images[0], split=split, group=False)


class Several(list[str]):
    """Files of several arguments. rejected, notes: see `Source`; the sums over the folders among the arguments."""

    def __init__(self, images: Sequence[str]) -> None:
        super().__init__()
        self.rejected: dict[str, int] = {}
        self.notes: list[str] = []
        for one in images:
            self.extend(self._folder(one) if os.path.isdir(one) else _matches(one) or [one])

    def _folder(self, folder: str) -> list[str]:
        source = open_source(folder)
        if source.kind != "images":
            raise UserError(f"{folder}: holds {source.kind}; give folders of tables or shards one at a time")
        for reason, count in source.rejected.items():
            self.rejected[reason] = self.rejected.get(reason, 0) + count
        self.notes += [f"{folder}: {note}" for note in source.notes if note not in source.caption_notes]
        return [str(file) for file in source.files]


def check_model(model: str, images: Sequence[str]) -> None:
    """Raises `UserError` where the model and the images were exchanged."""
    if not _is_model(model) and os.path.exists(model) and any(_is_model(one) for one in images):
        raise UserError(f"{model}: is no model, but the images name one; the order is MODEL IMAGES")


def _check(one: str, model: str) -> None:
    shown = shortened(one)
    refuse_no_path(one, "IMAGES: ")
    path = Path(one)
    if _is_model(one) and not _is_model(model) and os.path.exists(model):
        raise UserError(f"IMAGES: {shown}: a model, and {model} is none; the order is MODEL IMAGES")
    if _is_model(one):
        raise UserError(f"IMAGES: {shown}: a model folder; name images, a folder, a table or shards")
    if path.is_file() and path.suffix.lower() in (".txt", ".pdf"):
        raise UserError(
            f"IMAGES: {shown}: a {path.suffix} file, no image; name images, a folder, a table (.csv, .tsv, .jsonl, "
            ".parquet) or .tar shards"
        )
    if not os.path.lexists(one) and glob.has_magic(one) and not glob.glob(one, recursive=True):
        raise UserError(f"IMAGES: {shown}: the pattern matches no file")


def _matches(pattern: str) -> list[str] | None:
    """The files of a pattern, as a shell would list them; None for what is no pattern."""
    if os.path.lexists(pattern) or not glob.has_magic(pattern):
        return None
    return sorted(glob.glob(pattern, recursive=True))


def _is_picture(file: str) -> bool:
    path = Path(file)
    return not path.is_dir() and (path.suffix[1:].lower() in IMAGE_EXTENSIONS or is_image(path))


def _is_model(path: str) -> bool:
    folder = Path(path)
    if not folder.is_dir():
        return False
    weights = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    return any(
        (at / "config.json").is_file() and any((at / name).is_file() for name in weights)
        for at in (folder, folder / "model")
    )

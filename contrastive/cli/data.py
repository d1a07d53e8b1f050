"""Data sets that a command line names, opened before the model is, so that a mistake costs no time."""

from __future__ import annotations

from typing import Any

from contrastive.errors import UserError


def open_data(path: str | None, *, label: str | None = None, split: str | None = None, option: str = "--split") -> Any:
    """The set at `path`; the path itself where no column and no split is chosen, since a path names its cache.

    path: None gives None. option: the option that chooses the split of this set, for errors about it.
    """
    from contrastive.shards import open_source

    if path is None and split is not None:
        raise UserError(f"{option} {split}: of which set? Name a folder or file for it, or leave it out")
    if path is None:
        return None
    try:
        opened = open_source(path, label=label, split=split)
    except UserError as error:
        raise UserError(str(error).replace("--split ", f"{option} ")) from None
    return path if label is None and split is None else opened

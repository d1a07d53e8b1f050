"""Files that are complete or absent, a lock on a folder, and a full disk as one line."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from contrastive.errors import UserError
from contrastive.locks import Busy, only_one


def save_rows(path: Path, rows: Iterable[tuple[int, ...]], columns: int) -> None:
    """Write rows of whole numbers as an int64 array (n, columns) of numpy."""
    write_aside(path, lambda file: np.save(file, np.array(list(rows), np.int64).reshape(-1, columns)))


def write_aside(path: Path, content: bytes | Callable[[Any], None]) -> None:
    """Write a file under another name, then rename it: it is complete or absent, also after a loss of power.

    content: the bytes, or a function that writes them to the open file.
    """
    aside = path.with_name(f"{path.name}.aside-{os.getpid()}")
    try:
        with open(aside, "wb") as file:
            file.write(content) if isinstance(content, bytes) else content(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Report a full disk, quota or file size limit as a UserError that names `path`."""
    try:
        yield
    except OSError as fault:
        if fault.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise
        why = os.strerror(fault.errno)
        raise UserError(f"{path}: {why}; make room and run the same command again, finished parts are kept") from None


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other processes from making the same shards. Raises UserError where one does."""
    try:
        with only_one(folder):
            yield
    except Busy:
        raise UserError(f"{folder}: another process is making these shards; wait for it, or stop it") from None

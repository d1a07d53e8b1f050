"""Reading what a user's table or folder names: it may be anything, a pipe that never ends too."""

from __future__ import annotations

import os
import stat
from pathlib import Path

MAX_BYTES = 1 << 28  # of a source image; what is packed into shards is bounded more tightly


def read_regular(path: Path) -> tuple[bytes | None, str | None]:
    """The bytes of a regular file, and None; or None and why there are none (None too where it cannot be opened)."""
    try:
        # without O_NONBLOCK, opening a FIFO waits for somebody to write to it
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                return None, "not a regular file"
            data = file.read(MAX_BYTES + 1)
    except OSError:  # not there, a broken link, no permission
        return None, None
    return (data, None) if len(data) <= MAX_BYTES else (None, "image too large")

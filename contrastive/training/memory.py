"""How much memory a process takes, an end to it before it takes more than it may, and what becomes of freed memory."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import threading
import time
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
EVERY_SECONDS = 0.005
# mallopt(3) of glibc: its numbers, and how the environment names what would be changed
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_")
TUNABLES = tuple(f"glibc.malloc.{name}" for name in ("trim_threshold", "mmap_threshold", "mmap_max", "top_pad"))
LARGEST_KEPT = (1 << 30, 1 << 25)  # bytes of a block; the second where an older glibc takes no more


def reset_peak() -> None:
    """`peak_bytes` counts anew from now on, where the system can do that (Linux)."""
    try:
        CLEAR.write_text("5")
    except OSError:
        pass


def peak_bytes() -> int:
    """The largest resident set of this process, since `reset_peak` or its start."""
    if STATUS.is_file():
        # not ru_maxrss: a process that was forked inherits its parent's
        return _kib("VmHWM:") * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _kib(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1])


def end_above(limit: int, code: int) -> None:
    """End this process with exit code `code` as soon as its peak is above `limit` bytes; from a thread."""

    def watch() -> None:
        while peak_bytes() <= limit:
            time.sleep(EVERY_SECONDS)
        os._exit(code)

    threading.Thread(target=watch, name="memory", daemon=True).start()


def keep_freed_memory() -> bool:
    """From now on this process keeps blocks up to a GiB (`LARGEST_KEPT`) that it frees, and takes them again.

    A training step on a CPU frees the hundreds of megabytes that the next one takes. glibc returns much of that to the
    system, which hands out zeroed pages one by one, thousands of faults a step: docs/training-time.md has what that
    costs. No result changes. The peak grows by what lies in gaps, and stays.

    Returns:
        whether it was done: not without glibc, nor where the environment has settings for this, which then hold.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    chosen = any(name in os.environ for name in SETTINGS) or any(name in tunables for name in TUNABLES)
    if platform.libc_ver()[0] != "glibc" or chosen:
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # each call ends glibc's own adapting of both
    return any(mallopt(MMAP_THRESHOLD, size) for size in LARGEST_KEPT) and bool(mallopt(TRIM_THRESHOLD, -1))


def release_freed_memory() -> None:
    """Give back to the system what lies free now, where the C library is glibc."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)

"""How much memory a process takes, and an end to it before it takes more than it may."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
EVERY_SECONDS = 0.005


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

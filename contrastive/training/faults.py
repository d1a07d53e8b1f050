"""What may befall a process from outside: a signal to stop, and a step that never ends."""

from __future__ import annotations

import faulthandler
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# SLURM's and a cloud's warnings come as SIGUSR1 or SIGTERM
STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


@contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """An event that SIGINT, SIGTERM and SIGUSR1 set: the run saves at the next step boundary and stops.

    More of them change nothing, but a second Ctrl-C: that means now.
    """
    event = threading.Event()

    def request(number: int, frame: Any) -> None:
        if event.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        event.set()

    with _handling(request):
        yield event


@contextmanager
def exit_on_signal(code: int) -> Iterator[None]:
    """End the process with `code` on the same signals: for work that a later start simply does again."""

    def leave(number: int, frame: Any) -> None:
        raise SystemExit(code)

    with _handling(leave):
        yield


@contextmanager
def _handling(handler: Any) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in STOPPING}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


class Watchdog:
    """Ends the process, with the stacks of all its threads in a file, when a step takes too long.

    A process that waits in a collective for one that is stuck can do nothing else: Python does not get to run.

    Args:
        path: the file; its folder is made. seconds: None never ends the process.
    """

    def __init__(self, path: Path, seconds: float | None) -> None:
        self.path, self.seconds = path, seconds
        self._file = None
        if seconds is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("w")

    def watch(self) -> None:
        """From now on the time counts, anew."""
        if self._file is not None and self.seconds is not None:
            faulthandler.dump_traceback_later(self.seconds, exit=True, file=self._file)

    def rest(self) -> None:
        """The time does not count until `watch` is called."""
        if self._file is not None:
            faulthandler.cancel_dump_traceback_later()

    def close(self) -> None:
        """Rest for good; a file with nothing in it goes."""
        self.rest()
        if self._file is not None:
            self._file.close()
            self._file = None
            if self.path.exists() and not self.path.stat().st_size:
                self.path.unlink()

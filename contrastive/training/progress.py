"""What a user sees while a run goes on: a live bar on a terminal, one line now and then in a log file."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from tqdm import tqdm

LINE_EVERY_SECONDS = 10.0


def duration_text(seconds: float) -> str:
    """`seconds` as ``h:mm:ss`` or ``m:ss``."""
    minutes, whole = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{whole:02d}" if hours else f"{minutes}:{whole:02d}"


class Progress:
    """Rate, time left, share of the time spent waiting for data, and the loss."""

    def __init__(self, *, enabled: bool = True, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.enabled = enabled
        self.live = enabled and self.stream.isatty()
        self.bar = (
            tqdm(total=1000, file=self.stream, bar_format="{percentage:3.0f}%|{bar:20}|{desc}", leave=True)
            if self.live
            else None
        )
        self.last_line = 0.0

    def update(self, step: int, progress: float, seconds: float, rate: float, wait: float, loss: float) -> None:
        """Show the state after `step`: `rate` in pairs a second, `wait` the share of time in data wait."""
        if not self.enabled:
            return
        left = seconds / progress * (1 - progress) if progress > 0 else float("nan")
        text = (
            f" step {step} · {rate:,.0f} pairs/s · {duration_text(seconds)} done, "
            f"{duration_text(left) if left == left else '?'} left · data wait {wait:.0%} · loss {loss:.3f}"
        )
        if self.bar is not None:
            self.bar.n = int(progress * 1000)
            self.bar.set_description_str(text)
        elif time.monotonic() - self.last_line >= LINE_EVERY_SECONDS or progress >= 1:
            self.last_line = time.monotonic()
            print(f"{progress:4.0%}{text}", file=self.stream, flush=True)

    def write(self, message: str) -> None:
        """A line of its own, above the bar."""
        if self.bar is not None:
            self.bar.write(message, file=self.stream)
        elif self.enabled:
            print(message, file=self.stream, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

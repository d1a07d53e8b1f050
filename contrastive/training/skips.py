"""What becomes of pairs that cannot be used: counted by reason, one line each in a file, and too many stop the run."""

from __future__ import annotations

import json
import math
import os
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contrastive.errors import UserError

if TYPE_CHECKING:
    from contrastive.shards.batch import Rejection

RECENT = 10_000  # pairs over which the rate is taken: at half the limit, 0.5 %, seven deviations from a false alarm


class TooManySkips(UserError):
    """More pairs cannot be used than the recipe allows."""


class Skips:
    """Counts the pairs of a run that could not be used, and says when they are too many.

    limit: the largest share of the latest pairs, 0 to 1; the latest are `RECENT`, or one epoch where that is shorter,
        rounded up to whole steps.
    size: pairs in an epoch. path: the file of lines, {"step", "epoch", "shard", "key", "reason"}; None on a process
        that does not write it.

    failed: why a line could not be written, on the process that writes them; else None.
    counts: by reason, since the start of the run. Every process that is told the same has the same counts.
    """

    def __init__(self, limit: float, size: int, global_batch: int, path: Path | None) -> None:
        self.limit, self.global_batch, self.path = limit, global_batch, path
        self.steps = math.ceil(min(RECENT, size) / global_batch)
        self.counts: Counter[str] = Counter()
        self.recent: deque[int] = deque(maxlen=self.steps)  # pairs that each of the latest steps left out
        self.usable = False  # whether any pair was, so far
        self._bytes = 0  # of the lines that are counted
        self.failed: str | None = None  # why a line could not be written

    def add(self, step: int, rejected: Sequence[Rejection]) -> None:
        """Count what step number `step` (from 1) leaves out, over all processes, and write its lines.

        Raises:
            TooManySkips: the share of the latest pairs is above the limit, or the first of them gave no pair at all.
                The lines are written, the counts are those before.
        """
        try:
            if self.path is not None and rejected and self.failed is None:
                with self.path.open("a", encoding="utf-8") as file:
                    # a key may hold bytes that are no UTF-8; JSON's escapes keep them
                    file.writelines(json.dumps({"step": step, **one._asdict()}) + "\n" for one in rejected)
        except OSError as fault:  # on this process alone: all stop together at the next step, see the trainer
            self.failed = f"{self.path}: {fault.strerror}; make room and go on with --resume"
        recent = deque([*self.recent, len(rejected)], maxlen=self.steps)
        bad, seen = sum(recent), len(recent) * self.global_batch
        nothing = not self.usable and bad == seen and len(recent) == self.steps
        if nothing or bad > self.limit * self.steps * self.global_batch:
            raise TooManySkips(self._message(step, bad, seen, rejected))
        self.recent, self.usable = recent, self.usable or len(rejected) < self.global_batch
        self.counts.update(one.reason for one in rejected)
        if self.path is not None and rejected and self.failed is None:
            self._bytes = self.path.stat().st_size

    def _message(self, step: int, bad: int, seen: int, rejected: Sequence[Rejection]) -> str:
        reasons = self.counts + Counter(one.reason for one in rejected)
        counted = ", ".join(f"{reason}: {count:,}" for reason, count in reasons.most_common())
        shown = ", ".join(f"{one.key} in {one.shard}" for one in rejected[:3])
        what = (
            f"not one of the first {seen:,} pairs can be used"
            if bad == seen and not self.usable
            else f"{bad:,} of the latest {seen:,} pairs ({bad / seen:.1%}) cannot be used"
        )
        return (
            f"data.max_skip_rate: {self.limit:g} is passed at step {step}: {what} (so far {counted}; such as {shown}); "
            "rejected.jsonl in the run folder names each. Mend the shards, or raise data.max_skip_rate"
        )

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as JSON."""
        counted = {"counts": dict(self.counts), "recent": list(self.recent), "usable": self.usable}
        return {**counted, "bytes": self._bytes}

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to `state`: later lines leave the file, since their steps come again."""
        self.counts, self.usable, self._bytes = Counter(state["counts"]), state["usable"], state["bytes"]
        self.recent = deque(state["recent"], maxlen=self.steps)
        if self.path is not None and self.path.exists():
            os.truncate(self.path, min(self._bytes, self.path.stat().st_size))


def check_share(rejected: dict[str, int], good: int, limit: float, where: str) -> None:
    """Refuse a set of which indexing already left out more than the limit.

    Raises:
        TooManySkips: with the reasons and the remedy.
    """
    bad = sum(rejected.values())
    if bad > limit * (good + bad):
        counted = ", ".join(f"{reason}: {count:,}" for reason, count in Counter(rejected).most_common())
        raise TooManySkips(
            f"data.max_skip_rate: {limit:g} is passed before the first step: {bad:,} of {good + bad:,} samples in "
            f"{where} ({bad / (good + bad):.1%}) are no pairs ({counted}); `index.json` beside the shards names each. "
            "Mend the shards, or raise data.max_skip_rate"
        )

"""Where the time of training goes: its share by phase, without a wait for the device in any step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

# data: the loop waits for a batch. loss: its forward. communication: collectives that nothing else hides.
# validation: with the probe. other: what no phase claims, such as batches on their way to the device, and logging.
PHASES = ("data", "forward", "loss", "backward", "optimizer", "communication", "saving", "validation", "other")
KEPT = 512  # marks between two readings, at most: those that are past are added up


class Clock:
    """``enter`` says which phase begins; ``shares`` says how the time since the last call of it was spent.

    On a CPU a mark is the time. On CUDA it is an event in the stream, which the device stamps when it gets there: a
    phase lasts from the end of what was queued before it to the end of what was queued in it. What the host does while
    the device is busy counts for nothing, and a wait for data counts as far as the device had nothing to do. Marks are
    read in `shares`, which waits for the device. On any other device the host's time is taken: a phase then is what
    the host spends in it, and the device's work shows where the host waits for it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._phase = "other"
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._marks: list[tuple[str, Any]] = []  # a phase, and the moment in which it began
        self._spare: list[torch.cuda.Event] = []

    def start(self) -> None:
        """Forget what was, and begin with "other"."""
        self._marks.clear()
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self.enter("other")

    def enter(self, phase: str) -> None:
        """From here on time counts for `phase`, one of `PHASES`."""
        assert phase in self._seconds, phase
        self._phase = phase
        self._marks.append((phase, self._now()))
        if len(self._marks) > KEPT:
            self._add_up()

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """Count the block for `phase`, and what follows for the phase before."""
        before = self._phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def shares(self) -> dict[str, float]:
        """By phase the share of the time since the last call, or since `start`; together 1. Waits for the device."""
        self.enter(self._phase)
        if self._on_cuda:
            self._marks[-1][1].synchronize()
        self._add_up()
        total = sum(self._seconds.values())
        found = {phase: seconds / total if total else 0.0 for phase, seconds in self._seconds.items()}
        self._seconds = dict.fromkeys(PHASES, 0.0)
        return found

    @property
    def _on_cuda(self) -> bool:
        return self.device.type == "cuda"

    def _now(self) -> Any:
        if not self._on_cuda:
            return time.perf_counter()
        event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _add_up(self) -> None:
        """Turn the marks that the device has passed into seconds; the newest one stays."""
        done = 0
        for (phase, begin), (_, end) in pairwise(self._marks):
            if self._on_cuda and not end.query():
                break
            self._seconds[phase] += begin.elapsed_time(end) / 1e3 if self._on_cuda else end - begin
            done += 1
        if self._on_cuda:
            self._spare += [event for _, event in self._marks[:done]]
        del self._marks[:done]


def time_averaging(model: nn.Module, clock: Clock) -> None:
    """Count as communication what DDP's averaging of gradients takes behind the last of them.

    Until then it overlaps with backward, and is not seen. DDP hands its buckets over in order, so that the last one
    means that every gradient is there. The averaging itself stays DDP's.
    """
    if not isinstance(model, DistributedDataParallel):
        return
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    # without annotations: torch reads them, and takes no text for them
    def average(group, bucket):  # type: ignore[no-untyped-def]
        if bucket.is_last():
            clock.enter("communication")
        return allreduce_hook(group, bucket)

    model.register_comm_hook(model.process_group, average)

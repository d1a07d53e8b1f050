"""This machine as a card: its peak and its memory's bandwidth, measured in a second or two."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch

from contrastive.plan.cards import GIB, HERE, Card

SECONDS = 0.7  # for each measurement
LINK = {"cpu": 1.0}  # GB/s between processes: gloo through one machine's memory; not measured
LINK_ELSEWHERE = 32.0  # PCIe 4.0 with 16 lanes


def measured_card(precision: str) -> Card:
    """The accelerator of this machine, or its CPU with torch's number of threads."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    assert device is not None
    peak = {name: _products(device, name) for name in dict.fromkeys((precision, "fp32"))}
    return Card(HERE, peak, _memory(device), _copies(device), LINK.get(device.type, LINK_ELSEWHERE))


def _products(device: torch.device, precision: str) -> float:
    """TFLOP/s of a square product."""
    side = 2048 if device.type == "cpu" else 8192
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / _seconds(lambda: torch.mm(a, b), device) / 1e12


def _copies(device: torch.device) -> float:
    """GB/s of reading one large tensor and writing another."""
    a = torch.ones(64 << 20, device=device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / _seconds(lambda: b.copy_(a), device) / 1e9


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of one call, the fastest of as many as there is time for; the first does not count."""
    best, started = float("inf"), None
    while started is None or time.perf_counter() - started < SECONDS:
        before = time.perf_counter()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        if started is None:
            started = time.perf_counter()
            continue
        best = min(best, time.perf_counter() - before)
    return best


def _memory(device: torch.device) -> float:
    """GiB."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / GIB
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB

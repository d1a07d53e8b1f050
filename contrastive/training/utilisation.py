"""Model FLOPs utilisation against a peak that is measured, not read from a data sheet."""

from __future__ import annotations

import time
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from contrastive.training.flops import flops_per_sample

SECONDS = 0.5  # that measuring the peak may take
LONG_ENOUGH = 0.01  # seconds of a product beside which a launch counts for nothing
LARGEST = 8192  # side of a matrix: 128 MiB in bfloat16
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Utilisation:
    """The share of the peak that the model's own operations reach, see `row`.

    `peak` is in operations a second, of all processes: each measures its own at the same time. `flops` are the
    operations of a pair, counted on the first batch of each image size: where captions are cut to the longest of a
    batch, other batches may have somewhat more or less.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        dtype = DTYPES.get(accelerator.mixed_precision, torch.float32)
        accelerator.wait_for_everyone()
        self.peak = measured_peak(accelerator.device, dtype) * accelerator.num_processes
        self.device = accelerator.device
        self.flops: float | None = None
        self._size = 0

    def count(self, two_tower: nn.Module, batch: Any) -> None:
        """Count the operations of a pair, on two rows of `batch`, where its images have another size than before."""
        size = batch.pixels.shape[-1]
        if size != self._size:
            self._size = size
            rows = min(2, len(batch.tokens))
            self.flops = flops_per_sample(
                two_tower, batch.pixels[:rows].to(self.device), batch.tokens[:rows].to(self.device)
            )

    def row(self, pairs_per_second: float) -> dict[str, float]:
        """What is logged: the share of the peak, the peak, and the operations of a pair."""
        assert self.flops is not None
        share = pairs_per_second * self.flops / self.peak
        return {"train/mfu": share, "train/peak_flops": self.peak, "train/flops_per_pair": self.flops}


def measured_peak(device: torch.device, dtype: torch.dtype, seconds: float = SECONDS) -> float:
    """Operations a second in the best of the matrix products that fit into `seconds`.

    Matrices are square and grow until a product lasts a hundredth of a second. float32 is what the process computes
    float32 products in, TF32 where that is allowed.
    """
    size, best = 512, 0.0
    left, right = _operands(size, device, dtype)
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or not best:
        _wait(device)
        started = time.perf_counter()
        left @ right
        _wait(device)
        took = time.perf_counter() - started
        best = max(best, 2 * size**3 / took)
        if took < LONG_ENOUGH and size < LARGEST:
            size *= 2
            left, right = _operands(size, device, dtype)
    return best


def _operands(size: int, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    own = torch.Generator(device).manual_seed(0)  # the run's random numbers stay as they are
    return [torch.randn(size, size, generator=own, device=device, dtype=dtype) for _ in range(2)]


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()

"""What the loader hands to a training step."""

from dataclasses import dataclass, field

import torch


@dataclass
class Batch:
    """One process's samples of one step.

    pixels: uint8 (n, 3, height, width), channels last in memory. tokens: int64 (n, length).
    ids: int64 (n,), equal where two captions are the same.
    samples: int64 (n,), the number of each sample in its data set, the same in every epoch.
    valid: bool (n,), False for a sample that could not be read: its pixels are zero, its caption "".
    keys: n names. rejected: how many are not valid, by reason.
    """

    pixels: torch.Tensor
    tokens: torch.Tensor
    ids: torch.Tensor
    samples: torch.Tensor
    valid: torch.Tensor
    keys: list[str]
    rejected: dict[str, int] = field(default_factory=dict)

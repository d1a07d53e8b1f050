"""What the loader hands to a training step."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch


class Rejection(NamedTuple):
    """A sample that could not be used.

    epoch: of the sample's own set, from 0. shard: its path. reason: see `Rejected`.
    """

    epoch: int
    shard: str
    key: str
    reason: str


@dataclass
class Batch:
    """One process's samples of one step.

    pixels: uint8 (n, 3, height, width), channels last in memory. tokens: int64 (n, length).
    ids: int64 (n,), equal where two captions are the same; where the data hold an image twice, in every batch (n, 2),
        the ids of captions and of images.
    samples: int64 (n,), the number of each sample in its data set, the same in every epoch.
    valid: bool (n,), False for a sample that could not be read: its pixels are zero, its caption "".
    keys: n names. rejected: one entry for each sample that is not valid, in order of the rows.
    """

    pixels: torch.Tensor
    tokens: torch.Tensor
    ids: torch.Tensor
    samples: torch.Tensor
    valid: torch.Tensor
    keys: list[str]
    rejected: list[Rejection] = field(default_factory=list)

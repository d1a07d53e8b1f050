"""``train.compile``: both towers through torch.compile in training, with plain names in every file."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from contrastive.errors import UserError

# Lengths of captions, sizes of stages, the last chunk of a batch: each may be compiled anew before torch gives up.
KINDS = 64


def compile_towers(model: nn.Module) -> None:
    """Have the trunks of `model.image` and `model.text` compiled when they first run in training.

    What is compiled is a function that a tower holds, and no module: names of weights stay as they are, and so do
    checkpoints and model folders. In evaluation mode, as a locked tower is, the plain code runs. Random numbers are
    drawn as without it, so that dropout is the same, and the loss equal to rounding.

    Raises:
        UserError: there is no C++ compiler, which a CPU needs.
    """
    if not torch.accelerator.is_available() and shutil.which("c++") is None and shutil.which("g++") is None:
        raise UserError("train.compile: no C++ compiler (c++ or g++) on PATH; install g++, or set it to none")
    import torch._dynamo as dynamo  # slow to import
    from torch._inductor import config as inductor

    inductor.fallback_random = True
    dynamo.config.recompile_limit = max(KINDS, dynamo.config.recompile_limit)
    for tower in (model.image, model.text):
        assert isinstance(tower, nn.Module)
        tower.features = _compiled_in_training(tower)  # type: ignore[assignment]


def _compiled_in_training(tower: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    plain: Callable[[torch.Tensor], torch.Tensor] = tower.features
    compiled: Callable[[torch.Tensor], torch.Tensor] = torch.compile(plain)

    def features(x: torch.Tensor) -> torch.Tensor:
        return compiled(x) if tower.training else plain(x)

    return features

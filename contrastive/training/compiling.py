"""``train.compile``: both towers through torch.compile in training, with plain names in every file."""

from __future__ import annotations

import shutil
import sys
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
    drawn as without it, so that dropout is the same, and the loss equal to rounding. Where torch cannot compile a
    tower, perhaps for the sizes of a later stage, one line says so and the plain code runs from there on.

    Raises:
        UserError: there is no C++ compiler, which a CPU needs.
    """
    if not torch.accelerator.is_available() and shutil.which("c++") is None and shutil.which("g++") is None:
        raise UserError("train.compile: no C++ compiler (c++ or g++) on PATH; install g++, or set it to none")
    import torch._dynamo as dynamo  # slow to import
    from torch._inductor import config as inductor

    inductor.fallback_random = True
    dynamo.config.recompile_limit = max(KINDS, dynamo.config.recompile_limit)
    for name in ("image", "text"):
        tower = getattr(model, name)
        tower.features = _compiled_in_training(tower, name)


def _compiled_in_training(tower: Any, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    from torch._dynamo.exc import TorchDynamoException

    plain: Callable[[torch.Tensor], torch.Tensor] = tower.features
    compiled: Callable[[torch.Tensor], torch.Tensor] | None = torch.compile(plain)

    def features(x: torch.Tensor) -> torch.Tensor:
        nonlocal compiled
        if not tower.training or compiled is None:
            return plain(x)
        try:
            return compiled(x)
        except TorchDynamoException as error:
            compiled = None
            reason = (str(error).splitlines() or [""])[0]
            print(
                f"note: train.compile: torch cannot compile the {name} tower for {list(x.shape)} "
                f"({type(error).__name__}: {reason}); it runs without from here on",
                file=sys.stderr,
                flush=True,
            )
            return plain(x)

    return features

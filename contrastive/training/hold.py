"""Towers that are locked until a place in the run, as ``unfreeze_at`` asks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from contrastive.training.schedule import Point


class Hold:
    """Keeps the trunks of towers as they are until their places in the run; their projections learn from the start.

    A held trunk is in evaluation mode and has no gradient when the norm is taken and the optimizer steps. So nothing of
    it moves: AdamW leaves a parameter without a gradient out, its decay too, and its moments begin, with the bias
    correction of a first step, when it is let go. What is held follows from the step alone, so that a resumed run
    needs nothing of it from its checkpoint.

    On one process autograd is told (``requires_grad``), which spares the trunk's backward. DDP settles at its start
    whose gradients it averages, so there they are computed, averaged and dropped: until then a step takes as long as
    one that trains the tower.

    Args:
        model: as ``accelerator.prepare`` returned it. two_tower: the same without its wrapper.
        until: by tower, "image" or "text".
    """

    def __init__(self, model: nn.Module, two_tower: Any, until: Mapping[str, Point]) -> None:
        self.two_tower, self.until = two_tower, dict(until)
        self.averaged = isinstance(model, DistributedDataParallel)
        self.trunks = {
            tower: [parameter for parameter in two_tower.trunk_parameters(tower) if parameter.requires_grad]
            for tower in self.until
        }
        self.held: list[str] | None = None  # before the first step

    def move_to(self, step: int, share: float) -> None:
        """Hold and let go as belongs to the step with this number (from 0), begun at `share` of the run."""
        held = [tower for tower, until in self.until.items() if not until.reached(step, share)]
        if held == self.held or not self.until:
            return
        self.held = held
        self.two_tower.hold(held)
        if not self.averaged:
            for tower, trunk in self.trunks.items():
                for parameter in trunk:
                    parameter.requires_grad_(tower not in held)

    def drop_gradients(self) -> None:
        """Forget the gradients of the trunks that are held; call it between backward and clipping."""
        for tower in self.held or ():
            for parameter in self.trunks[tower]:
                parameter.grad = None

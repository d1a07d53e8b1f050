"""A running average of the weights, which a run is validated with and ends with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

STEPS = "steps"  # of the state; no parameter has the name


class WeightAverage:
    """The exponential moving average of a model's weights (Polyak & Juditsky 1992; EMA of TensorFlow, timm, BYOL).

    Behind optimizer step n, from 1: ``average = d * average + (1 - d) * weights`` with
    ``d = min(decay, (1 + n) / (10 + n))``: the start, which is chance, is forgotten fast, whatever the decay. A decay
    of d remembers about 1 / (1 - d) steps.

    In float32, of the parameters that learn and of the running statistics of batch normalisation: those are a function
    of the weights, so that their average fits the averaged weights to first order, and the newest would not. Buffers
    of other kinds (masks, tables, counters) are the model's own.

    Args:
        model: whose `requires_grad` says which parameters learn; on its device, with its starting weights.
        decay: per step, 0 to 1. every: steps from one update to the next, which then takes ``decay ** every``: the
            same memory in steps, a share of the cost.
    """

    def __init__(self, model: nn.Module, decay: float, every: int = 1) -> None:
        assert 0 <= decay < 1 and every >= 1
        self.decay, self.every = decay, every
        self.steps = 0
        found = _averaged(model)
        self.names, self.weights = list(found), list(found.values())
        self.average = [weight.detach().float().clone() for weight in self.weights]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights; call it behind each step that changed them."""
        self.steps += 1
        if self.steps % self.every:
            return
        decay = min(self.decay**self.every, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.average, [weight.detach().float() for weight in self.weights], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the average within the block, and its own weights, bit for bit, behind it."""
        own = [weight.detach().clone() for weight in self.weights]
        self.copy_to_model()
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.weights, own)

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """The model has the average from now on."""
        torch._foreach_copy_(self.weights, self.average)

    def state_dict(self) -> dict[str, Tensor]:
        """The average by the names of the model's state, and the count of steps."""
        return {**dict(zip(self.names, self.average, strict=True)), STEPS: torch.tensor(self.steps)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state_dict` gave.

        Raises:
            KeyError: it is not the state of this model: names differ.
        """
        if set(state) != {*self.names, STEPS}:
            raise KeyError(next(iter(set(state) ^ {*self.names, STEPS})))
        self.steps = int(state[STEPS])
        for name, average in zip(self.names, self.average, strict=True):
            average.copy_(state[name])

    def start_anew(self) -> None:
        """Forget everything: the average is the weights that the model has now."""
        self.steps = 0
        for average, weight in zip(self.average, self.weights, strict=True):
            average.copy_(weight.detach())


def _averaged(model: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {key: value for key, value in model.named_parameters() if value.requires_grad}
    for prefix, part in model.named_modules():
        # a locked tower's statistics stay as they are, and so does their average
        if isinstance(part, _BatchNorm) and part.running_mean is not None:
            name = f"{prefix}." if prefix else ""
            found |= {f"{name}running_mean": part.running_mean, f"{name}running_var": part.running_var}
    return found

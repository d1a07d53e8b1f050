"""How many floating-point operations a pair costs: counted on the model itself, products and convolutions only.

One multiplication with its addition counts as two. Normalisations, activations, the loss and the optimizer are left
out, as is usual: they are a few percent, and no peak of products is measured in them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


def flops_per_sample(model: nn.Module, pixels: Tensor, tokens: Tensor) -> float:
    """Operations of one forward and one backward of a two-tower `model`, divided by the number of pairs.

    The model runs once on what is given, as it stands (in its mode, with its frozen parameters, whose gradient is not
    computed and not counted); two rows are enough, and more than one where it has batch normalisation. Its gradients,
    its buffers and the random states are left as they were. What is computed twice to save memory (gradient
    checkpointing) counts once: these are the operations that the model needs (Chowdhery et al. 2022, arXiv:2204.02311,
    appendix B), not those that the machine does.

    Args:
        pixels, tokens: a batch as ``model(pixels, tokens)`` takes it, on the model's device; the count of a text tower
            depends on the number of tokens.
    """
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    device = pixels.device
    counter = _Counter()
    # Fused attention has no formula on a CPU; written out, it is two products forward and four backward everywhere.
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        sdpa_kernel(SDPBackend.MATH),
        counter,
    ):
        out = model(pixels, tokens)
        values = out.values() if isinstance(out, Mapping) else [out]
        ends = [value.sum() for value in values if isinstance(value, Tensor) and value.requires_grad]
        if ends:
            counter.backward = True
            # not backward(): that would leave gradients, and wake the hooks by which DDP averages them
            torch.autograd.grad(ends, learned, allow_unused=True)
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    return counter.total / len(pixels)


class _Counter(TorchDispatchMode):
    """Adds up torch's formulas for the operators that pass.

    torch's FlopCounterMode would do, but counts what gradient checkpointing computes again. That happens in backward,
    with gradients enabled; backward itself runs without.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total, self.backward = 0, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None and not (self.backward and torch.is_grad_enabled()):
            self.total += formula(*args, **kwargs, out_val=found)
        return found

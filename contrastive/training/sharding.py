"""Weights, gradients and moments cut into shares, one a process: FSDP2, `torch.distributed.fsdp.fully_shard`.

Each process keeps 1/W of every large parameter and of what AdamW keeps for it, and gathers a block's weights for the
moment that it is computed. Gradients are averaged as DDP averages them, so a step is the same to rounding.

accelerate's own FSDP2 refuses parameters without a dimension, as the logit scale is, and machines without an
accelerator; here those parameters stay whole on every process, and their gradients are averaged one by one.
Checkpoints hold whole tensors: a run may be resumed with or without sharding, on any number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from contrastive.errors import UserError


def shard(model: nn.Module, device: torch.device) -> nn.Module:
    """Shard a two-tower model over all processes, in place: every block of its towers by itself, then the rest.

    Raises:
        UserError: a module takes its statistics from all rows of a batch; nobody would keep them alike.
    """
    for name, part in model.named_modules():
        if getattr(part, "running_var", None) is not None:
            raise UserError(
                f"train.sharding: fsdp does not go with {name} ({type(part).__name__}), whose running statistics "
                "would differ between processes; set it to none, or choose a tower with layer normalisation"
            )
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()  # FSDP2 takes no channels-last weights
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    scalars = {parameter for parameter in model.parameters() if parameter.ndim == 0}
    for part in reversed(list(model.modules())):  # FSDP2 wants what lies inside first
        if _repeats_blocks(part):
            for block in part.children():
                fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=scalars)
    return model


def _repeats_blocks(part: nn.Module) -> bool:
    """Whether `part` is a tower's list of blocks, of one kind: a ModuleList, or a Sequential, as timm's have."""
    blocks = list(part.children())
    alike = len({type(block) for block in blocks}) == 1 and any(True for _ in part.parameters())
    return isinstance(part, nn.ModuleList | nn.Sequential) and alike and all(any(b.children()) for b in blocks)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` has been here."""
    return isinstance(model, FSDPModule)


def average_scalars(model: nn.Module) -> None:
    """Average over processes the gradients that `shard` left whole."""
    for parameter in model.parameters():
        if not isinstance(parameter, DTensor) and parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


def without_averaging(model: nn.Module) -> Callable[[], AbstractContextManager[Any]]:
    """Of DDP and FSDP2 alike: a context in which backward keeps gradients to the process."""
    if isinstance(model, FSDPModule):
        return lambda: _unsynchronised(model)
    found: Callable[[], AbstractContextManager[Any]] = getattr(model, "no_sync", nullcontext)
    return found


@contextmanager
def _unsynchronised(model: FSDPModule) -> Iterator[None]:
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def clip_gradients(parameters: Iterable[nn.Parameter], most: float) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` for a mixture of sharded and whole parameters; the norm before, 0-d."""
    shares: list[Tensor] = []
    whole: list[Tensor] = []
    owners: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in parameters:
        if parameter.grad is not None:
            sharded = isinstance(parameter.grad, DTensor)
            (shares if sharded else whole).append(parameter.grad)
            owners[sharded].append(parameter)
    norms = [torch.nn.utils.get_total_norm(gradients) for gradients in (shares, whole) if gradients]
    total = torch.stack([complete(norm) for norm in norms]).norm() if norms else torch.tensor(0.0)
    if math.isfinite(most):
        for group in owners.values():
            torch.nn.utils.clip_grads_with_norm_(group, most, total)
    return total


def complete(value: Tensor) -> Tensor:
    """The whole tensor on every process; all of them call it, in the same order."""
    found: Tensor = value.full_tensor() if isinstance(value, DTensor) else value
    return found


def fill(model: nn.Module, shares: nn.Module) -> None:
    """Put the whole weights of a sharded model into one of the same architecture; see `drain` for the others."""
    own = model.state_dict()
    with torch.no_grad():
        for key, value in shares.state_dict().items():
            own[key].copy_(complete(value))


def drain(shares: nn.Module) -> None:
    """Take part in `fill`, which happens on another process."""
    for value in shares.state_dict().values():
        complete(value)


def is_share(value: object) -> bool:
    """Whether a tensor is this process's share of one that is larger."""
    return isinstance(value, DTensor)


def like(value: Tensor, model: Tensor | None) -> Tensor:
    """`value`, whole and equal on every process, in shares as `model` is; itself where that is whole."""
    if isinstance(model, DTensor) and value.shape == model.shape:
        device = model.device_mesh.device_type
        return distribute_tensor(value.to(device), model.device_mesh, model.placements, src_data_rank=None)
    return value

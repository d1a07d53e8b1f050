"""The global batch as one rank sees it: its own rows, everybody's rows, and gradients that flow back.

Legend: n rows of this rank, W ranks, B = W * n rows in all, D feature width.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from contrastive.errors import UserError


class _GatherRows(torch.autograd.Function):
    """All ranks' rows, in order of rank; backward *sums* over ranks what each of them owes to a row."""

    @staticmethod
    def forward(ctx: Any, rows_nD: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return _all_gather(rows_nD, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BD: Tensor) -> tuple[Tensor, None]:
        world, rank = dist.get_world_size(ctx.group), dist.get_rank(ctx.group)
        n = grad_BD.shape[0] // world
        if dist.get_backend(ctx.group) == "nccl":
            grad_nD = grad_BD.new_empty(n, *grad_BD.shape[1:])
            dist.reduce_scatter_tensor(grad_nD, grad_BD.contiguous(), group=ctx.group)
            return grad_nD, None
        # gloo has no reduce-scatter on the older versions of torch that we support
        grad_BD = grad_BD.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad_BD, group=ctx.group)
        return grad_BD[rank * n : (rank + 1) * n], None


def _all_gather(rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    everybody = rows.new_empty(dist.get_world_size(group) * rows.shape[0], *rows.shape[1:])
    dist.all_gather_into_tensor(everybody, rows.contiguous(), group=group)
    return everybody


@dataclass(frozen=True)
class GlobalBatch:
    """What a loss needs to know of the global batch. On one process the `_B` tensors are the local ones."""

    image_nD: Tensor
    text_nD: Tensor
    image_BD: Tensor
    text_BD: Tensor
    scale: Tensor  # in the precision of the features
    bias: Tensor | None
    ids_n: Tensor | None
    ids_B: Tensor | None
    valid_n: Tensor | None  # None: every row is valid
    valid_B: Tensor | None
    world: int
    rank: int

    @property
    def rows(self) -> slice:
        """Where this rank's rows lie in the global batch."""
        n = self.image_nD.shape[0]
        return slice(self.rank * n, (self.rank + 1) * n)

    @property
    def own(self) -> Tensor:
        """`(n,)` int64: for each local row its column in an `(n, B)` block, the place of its own partner."""
        return torch.arange(self.rows.start, self.rows.stop, device=self.image_nD.device)

    def same_id(self) -> Tensor:
        """`(n, B)` bool: another row with the id of this one. The row itself is not counted."""
        assert self.ids_n is not None and self.ids_B is not None
        same_nB = self.ids_n[:, None] == self.ids_B[None, :]
        return same_nB.scatter_(1, self.own[:, None], False)

    def mean_over_anchors(self, per_anchor_n: Tensor) -> Tensor:
        """The share of this rank in a mean over the valid rows of the global batch.

        It is multiplied by W, so that the *mean* over ranks of what is returned is that mean. With the
        summing backward of the gather, DDP's mean over ranks of the parameter gradients is then exact.
        """
        if self.valid_n is None or self.valid_B is None:
            return per_anchor_n.mean()
        # a sum of zero terms over a count of at least one: a batch without any valid row has loss 0
        total = per_anchor_n.masked_fill(~self.valid_n, 0).sum()
        return total * self.world / self.valid_B.sum().clamp(min=1)

    def keep_in_graph(self, loss: Tensor) -> Tensor:
        """`loss` with a zero gradient for scale and bias where it does not depend on them, for DDP."""
        loss = loss + 0 * self.scale
        return loss if self.bias is None else loss + 0 * self.bias


def gather_batch(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    ids: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    valid: Tensor | None = None,
) -> GlobalBatch:
    """Check the arguments of a loss and gather the rows of all ranks; call it with autocast disabled.

    One collective carries the features of both towers; another one ids and valid flags, where there are any.
    Raises UserError for shapes and types that no loss can take.
    """
    _check(image, text, scale, bias, ids, valid)
    dtype = torch.promote_types(torch.promote_types(image.dtype, text.dtype), torch.float32)
    image, text, scale = image.to(dtype), text.to(dtype), scale.to(dtype).reshape(())
    bias = None if bias is None else bias.to(dtype).reshape(())

    world = dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1
    if world == 1:
        return GlobalBatch(image, text, image, text, scale, bias, ids, ids, valid, valid, 1, 0)

    if image.device.type == "cpu":  # elsewhere the check would make the host wait for the device every step
        sizes = _all_gather(torch.tensor([image.shape[0]]), group).tolist()
        assert len(set(sizes)) == 1, f"local batches of {sizes} rows: pad them to one size and use `valid`"
    both = _GatherRows.apply(torch.cat([image, text], dim=1), group)
    image_all, text_all = both.split(image.shape[1], dim=1)
    ids_all = valid_all = None
    extra = [x.to(torch.int64) for x in (ids, valid) if x is not None]
    if extra:
        columns = list(_all_gather(torch.stack(extra, dim=1), group).unbind(dim=1))
        ids_all = columns.pop(0) if ids is not None else None
        valid_all = columns.pop(0).bool() if valid is not None else None
    rank = dist.get_rank(group)
    return GlobalBatch(image, text, image_all, text_all, scale, bias, ids, ids_all, valid, valid_all, world, rank)


def _check(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, ids: Tensor | None, valid: Tensor | None
) -> None:
    if image.ndim != 2 or image.shape != text.shape or image.shape[0] == 0:
        raise UserError(
            f"image {tuple(image.shape)} and text {tuple(text.shape)}: a loss takes features of one shape, "
            "(n, dim) with n > 0; project both towers to the same width and give as many captions as images"
        )
    if not (image.is_floating_point() and text.is_floating_point()):
        raise UserError(f"image {image.dtype} and text {text.dtype}: a loss takes floating-point features")
    for name, value in (("scale", scale), ("bias", bias)):
        if value is not None and value.numel() != 1:
            raise UserError(f"{name} of shape {tuple(value.shape)}: a loss takes a 0-d tensor")
    for name, value, dtype in (("ids", ids, torch.int64), ("valid", valid, torch.bool)):
        if value is not None and (value.shape != image.shape[:1] or value.dtype != dtype):
            raise UserError(f"{name} is {value.dtype} {tuple(value.shape)}: a loss takes {dtype} ({image.shape[0]},)")


def check_same_caption(same_caption: str, choices: tuple[str, ...], ids: Tensor | None) -> None:
    """Raise UserError for an unknown treatment of equal captions, or for ids missing where it needs them."""
    if same_caption not in choices:
        raise UserError(f"same_caption {same_caption!r}: choose one of {', '.join(choices)}")
    if same_caption != "negative" and ids is None:
        raise UserError(f"same_caption {same_caption!r} needs the captions' ids: pass `ids`, or use 'negative'")

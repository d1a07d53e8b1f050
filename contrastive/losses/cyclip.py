"""CyCLIP's regulariser: similarities should not depend on which of two pairs lends its image and which its caption.

Legend: n rows of this rank, B rows in all, D feature width.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from contrastive.losses.contract import LARGEST_FLOAT, Loss, check_number, device_type
from contrastive.losses.gather import GlobalBatch, global_batch, refuse_second_derivative
from contrastive.losses.waiting import exchanging


def cyclip(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    ids: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    valid: Tensor | None = None,
    *,
    in_modal: float = 0.25,
    cross_modal: float = 0.25,
    check: bool | None = None,
) -> dict[str, Tensor]:
    """in_modal * sum_ij (image_i.image_j - text_i.text_j)^2 / B  +  cross_modal * sum_ij (s_ij - s_ji)^2 / B.

    Arguments as in `contrastive.losses`. A regulariser, not a loss of its own: constant features have none. Use it
    beside InfoNCE: `loss: [{kind: infonce}, {kind: cyclip}]`. The sums are divided by B, as in the paper, where a mean
    over all pairs would divide by B^2. Scale and bias do not appear; their gradients are zero.

    Squares of differences of B x B products are traces of D x D products,  ||XX' - YY'||^2 = ||X'X||^2 - 2 ||X'Y||^2 +
    ||Y'Y||^2,  so that no B x B matrix arises: time O(n D^2), memory O(n D + D^2), and what ranks exchange, three D x D
    matrices, does not grow with the batch. They are summed in float64, since the traces nearly cancel once the loss
    is small; on a device without float64 that shows.

    Returns "loss", "in_modal" and "cross_modal", the two terms without their weights.
    Raises UserError for a weight below zero and for shapes that do not fit.

    Source: Goel et al. 2022 (arXiv:2205.14459), equations 3 and 4.
    """
    for name, weight in (("in_modal", in_modal), ("cross_modal", cross_modal)):
        check_number(name, weight, 0, LARGEST_FLOAT, "choose a finite weight of at least 0; the paper's is 0.25")
    with torch.autocast(device_type(image), enabled=False):
        batch = global_batch(image, text, scale, bias, ids, group, valid, check)
        image_nD, text_nD = batch.image_nD, batch.text_nD
        if image.device.type != "mps":
            image_nD, text_nD = image_nD.double(), text_nD.double()
        ii_DD, tt_DD, it_DD = _sum_over_ranks(
            torch.stack([image_nD.T @ image_nD, text_nD.T @ text_nD, image_nD.T @ text_nD]), batch
        )
        inside = ii_DD.square().sum() - 2 * it_DD.square().sum() + tt_DD.square().sum()
        across = 2 * ((ii_DD * tt_DD).sum() - (it_DD * it_DD.T).sum())
        inside, across = ((x / batch.anchors).to(batch.scale.dtype) for x in (inside, across))
        loss = batch.keep_in_graph(in_modal * inside + cross_modal * across)
        return {"loss": loss, "in_modal": inside.detach(), "cross_modal": across.detach()}


class _SumOverRanks(torch.autograd.Function):
    """The sum over ranks; backward sums over ranks what each of them owes to it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        total = value.clone()
        with exchanging():
            dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        refuse_second_derivative()
        grad = grad.clone()
        with exchanging():
            dist.all_reduce(grad, group=ctx.group)
        return grad, None


def _sum_over_ranks(value: Tensor, batch: GlobalBatch) -> Tensor:
    return value if batch.world == 1 else _SumOverRanks.apply(value, batch.group)


class CyCLIP(Loss):
    """`cyclip` with its options bound; it has no parameters and no state."""

    function = staticmethod(cyclip)

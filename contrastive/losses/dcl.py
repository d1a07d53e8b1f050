"""Decoupled contrastive learning: InfoNCE without the positive in its own denominator.

Legend: n rows of this rank, B rows in all.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from contrastive.losses.contract import Loss, check_same_caption, check_tiling, device_type
from contrastive.losses.gather import GlobalBatch, global_batch
from contrastive.losses.softmax import SoftmaxKernel
from contrastive.losses.tiled import tiled_loss

CHOICES = ("negative", "ignore")


def dcl(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    ids: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    valid: Tensor | None = None,
    *,
    same_caption: str = "negative",
    tile: int | str | None = "auto",
    exchange: str = "auto",
    check: bool | None = None,
) -> dict[str, Tensor]:
    """Mean over pairs and both directions of  -t s_ii + log sum_{j != i} exp(t s_ij).

    Arguments as in `contrastive.losses`.

    Against InfoNCE the factor 1 - p_ii is gone from the gradient, which there makes easy pairs in small batches count
    little: use it where the global batch is small. The loss can be negative. A pair without negatives has no term.

    same_caption: "negative", or "ignore" to leave rows with equal `ids` out of each other's sums.

    Returns "loss" and "accuracy" (the share of images more similar to their caption than to any other).
    Raises UserError for shapes that do not fit, for `ids` missing where `same_caption` needs them.

    Source: Yeh et al. 2022 (arXiv:2110.06848), equation 6, in both directions.
    """
    check_same_caption(same_caption, CHOICES)
    check_tiling(tile, exchange)
    with torch.autocast(device_type(image), enabled=False):
        batch = global_batch(image, text, scale, bias, ids, group, valid, check, same_caption)
        leave_out_same = same_caption == "ignore"
        if tile is None:
            return _plain(batch, leave_out_same)
        loss, kernel = tiled_loss(
            batch,
            lambda b: DCLKernel(b, leave_out_same=leave_out_same, leave_out_own=True),
            tile=tile,
            exchange=exchange,
        )
        return {"loss": loss, "accuracy": kernel.accuracy()}


def _plain(batch: GlobalBatch, leave_out_same: bool) -> dict[str, Tensor]:
    """The formula on `(n, B)` logits, with torch's own gradient."""
    own_n, (log_row_n, log_column_n), accuracy = log_sums_of_negatives(batch, leave_out_same)
    counted_n = batch.negatives(leave_out_same=leave_out_same)[batch.rows] > 0
    per_anchor_n = ((log_row_n + log_column_n) / 2 - own_n).masked_fill(~counted_n, 0)
    return {"loss": batch.keep_in_graph(batch.mean_over_anchors(per_anchor_n)), "accuracy": accuracy}


def log_sums_of_negatives(batch: GlobalBatch, leave_out_same: bool) -> tuple[Tensor, list[Tensor], Tensor]:
    """Plainly: each pair's own logit, the log-sums over the negatives of its row and its column, the accuracy.

    A pair without negatives gets log-sums of 0.
    """
    left_out_nB = torch.zeros(len(batch.own), batch.size, dtype=torch.bool, device=batch.scale.device)
    left_out_nB.scatter_(1, batch.own[:, None], True)
    if batch.valid_B is not None:
        left_out_nB |= ~batch.valid_B[None, :]
    if leave_out_same:
        left_out_nB |= batch.same_id()
    own_n = batch.scale * (batch.image_nD * batch.text_nD).sum(dim=1)
    counted_n = batch.negatives(leave_out_same=leave_out_same)[batch.rows] > 0
    log_sums, best_n = [], None
    for similarity_nB in batch.similarities():
        logits_nB = (batch.scale * similarity_nB).masked_fill(left_out_nB, -torch.inf)
        best_n = logits_nB.detach().amax(dim=1) if best_n is None else best_n
        # log of an empty sum has no gradient: such rows get another one, and do not count
        log_sums.append(logits_nB.masked_fill(~counted_n[:, None], 0).logsumexp(dim=1).masked_fill(~counted_n, 0))
    assert best_n is not None
    return own_n, log_sums, batch.mean_over_anchors((own_n.detach() > best_n).to(own_n.dtype))


class DCLKernel(SoftmaxKernel):
    """Log-sum over the negatives minus the own logit."""

    def loss(self) -> Tensor:
        row_n, column_n = self.sums.log_sums(self.batch)
        per_anchor_n = ((row_n + column_n) / 2 - self.own_logit_n).masked_fill(~self.counted_n, 0)
        return self.batch.mean_over_anchors(per_anchor_n)


class DCL(Loss):
    """`dcl` with its options bound; it has no parameters and no state."""

    function = staticmethod(dcl)

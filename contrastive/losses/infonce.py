"""InfoNCE: each image finds its caption among all captions of the global batch, and each caption its image.

Legend: n rows of this rank, B rows in all; r x c a tile, r of the n rows and c of the B columns.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from contrastive.losses.contract import Loss, check_number, check_same_caption, check_tiling, device_type
from contrastive.losses.gather import GlobalBatch, global_batch
from contrastive.losses.softmax import SoftmaxKernel
from contrastive.losses.tiled import Tile, tiled_loss

CHOICES = ("negative", "ignore", "positive")


def infonce(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    ids: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    valid: Tensor | None = None,
    *,
    same_caption: str = "negative",
    label_smoothing: float = 0.0,
    tile: int | str | None = "auto",
    exchange: str = "auto",
    check: bool | None = None,
) -> dict[str, Tensor]:
    """Symmetric cross-entropy of `scale * image @ text.T`; arguments as in `contrastive.losses`.

    The mean over the B valid pairs and both directions of  -log(exp(t s_ii) / sum_j exp(t s_ij)),  with t the
    scale and s the similarities. (Printed without exp and t in some lecture notes: that form is a slip.)
    A bias common to all logits cancels out; its gradient is zero.

    same_caption says what two rows with equal `ids` (an equal caption or image, see `contrastive.losses`) are to one
    another:
      "negative": pushed apart like any two rows. Without `ids` this is the only choice;
          it equals `open_clip.ClipLoss` (on several ranks with `local_loss` and `gather_with_grad`).
      "ignore": left out of each other's denominators. The best choice where captions repeat.
      "positive": the target of a row is uniform over itself and all rows that are the same, as in supervised
          contrastive learning. Under ids of two columns rows may have different numbers of them; each row's target
          sums to 1.
    label_smoothing: this share of the target is spread evenly over all columns that take part in the row.

    Returns "loss" and "accuracy" (the share of images more similar to their caption than to any other; captions that
    are ignored or positives do not count as others).
    Raises UserError for shapes that do not fit, for `ids` missing where `same_caption` needs them.

    Source: van den Oord et al. 2018 (arXiv:1807.03748); Radford et al. 2021 (arXiv:2103.00020), figure 3;
    several positives: Khosla et al. 2020 (arXiv:2004.11362), equation 2.
    """
    check_same_caption(same_caption, CHOICES)
    check_tiling(tile, exchange)
    check_number("label_smoothing", label_smoothing, 0, 0.999, "choose a share from 0 to 0.999")
    with torch.autocast(device_type(image), enabled=False):
        batch = global_batch(image, text, scale, bias, ids, group, valid, check, same_caption)
        if tile is None:
            return _plain(batch, same_caption, label_smoothing)
        loss, kernel = tiled_loss(
            batch, lambda b: InfoNCEKernel(b, same_caption, label_smoothing), tile=tile, exchange=exchange
        )
        return {"loss": loss, "accuracy": kernel.accuracy()}


def _plain(batch: GlobalBatch, same_caption: str, label_smoothing: float) -> dict[str, Tensor]:
    """The formula on `(n, B)` logits, with torch's own gradient."""
    logits_image_nB, logits_text_nB = (batch.scale * s_nB for s_nB in batch.similarities())
    same_nB = None if same_caption == "negative" else batch.same_id()
    left_out = None if batch.valid_B is None else ~batch.valid_B[None, :]
    if same_caption == "ignore" and same_nB is not None:
        left_out = same_nB if left_out is None else same_nB | left_out
    if left_out is not None:
        # an infinite logit has no share in the softmax, and masked_fill stops its gradient
        logits_image_nB = logits_image_nB.masked_fill(left_out, -torch.inf)
        logits_text_nB = logits_text_nB.masked_fill(left_out, -torch.inf)

    if same_caption == "positive" or label_smoothing > 0:
        positive_nB = F.one_hot(batch.own, batch.size).bool()
        if same_caption == "positive" and same_nB is not None:
            positive_nB = positive_nB | same_nB
        if left_out is None:
            left_out = torch.zeros_like(positive_nB)
        target_nB = (1 - label_smoothing) * _uniform(positive_nB & ~left_out, batch.scale.dtype)
        target_nB += label_smoothing * _uniform((~left_out).expand_as(positive_nB), batch.scale.dtype)
        per_anchor_n = _soft_cross_entropy(logits_image_nB, target_nB, left_out)
        per_anchor_n = per_anchor_n + _soft_cross_entropy(logits_text_nB, target_nB, left_out)
    else:
        # the own column of a row that is not valid is left out; -100 is cross_entropy's "skip this row"
        target_n = batch.own if batch.valid_n is None else batch.own.masked_fill(~batch.valid_n, -100)
        per_anchor_n = F.cross_entropy(logits_image_nB, target_n, reduction="none")
        per_anchor_n = per_anchor_n + F.cross_entropy(logits_text_nB, target_n, reduction="none")

    loss = batch.keep_in_graph(batch.mean_over_anchors(per_anchor_n / 2))
    with torch.no_grad():
        others_nB = logits_image_nB.scatter(1, batch.own[:, None], -torch.inf)
        own_n = logits_image_nB.gather(1, batch.own[:, None])[:, 0]
        if same_caption == "positive" and same_nB is not None:
            own_n = torch.maximum(own_n, logits_image_nB.masked_fill(~same_nB, -torch.inf).amax(dim=1))
            others_nB = others_nB.masked_fill(same_nB, -torch.inf)
        right_n = own_n > others_nB.amax(dim=1)
        return {"loss": loss, "accuracy": batch.mean_over_anchors(right_n.to(loss.dtype))}


def _uniform(mask_nB: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows that sum to 1, evenly over the columns in the mask; an empty row stays zero."""
    return mask_nB.to(dtype) / mask_nB.sum(dim=1, keepdim=True).clamp(min=1)


def _soft_cross_entropy(logits_nB: Tensor, target_nB: Tensor, left_out: Tensor) -> Tensor:
    # 0 * -inf is NaN: the columns that are left out have target 0, so any finite number serves in their place
    return -(target_nB * logits_nB.log_softmax(dim=1).masked_fill(left_out, 0)).sum(dim=1)


class InfoNCEKernel(SoftmaxKernel):
    """Log-sum minus the target's mean logit; the target is the own column, or spread over several."""

    def __init__(self, batch: GlobalBatch, same_caption: str, label_smoothing: float) -> None:
        super().__init__(batch, leave_out_same=same_caption == "ignore", positives=same_caption == "positive")
        self.spread = self.positives or label_smoothing > 0  # the target is more than the own column
        if not self.spread:
            return
        self.target_n, self.target_B = torch.zeros_like(self.own_n), batch.scale.new_zeros(batch.size)
        # What the target gives one positive, and one column that takes part, for each anchor of the global batch.
        counted_B = self.counted_B.to(self.target_B.dtype)
        positives_B = torch.ones_like(counted_B)
        if self.positives:
            positives_B = (counted_B.sum() - batch.negatives(leave_out_same=True)).clamp(min=1)
        parts_B = 1 + batch.negatives(leave_out_same=self.leave_out_same)
        self.positive_weight_B = counted_B * (1 - label_smoothing) / positives_B
        self.part_weight_B = counted_B * label_smoothing / parts_B
        # Rows of equal ids have equally many positives, so that one weighs the same for its row and its column. Rows
        # with an equal caption or an equal image need not.
        self.both_alike = not self.positives or batch.ids_n is None or batch.ids_n.ndim == 1

    def observe(self, x_rc: Tensor, fixed_rc: Tensor | None, tile: Tile) -> None:
        if self.spread:
            target_row_rc, target_column_rc = self._targets(x_rc, tile)
            self.target_n[tile.rows] += (target_row_rc * x_rc).sum(dim=1)
            self.target_B[tile.columns] += (target_column_rc * x_rc).sum(dim=0)
        super().observe(x_rc, fixed_rc, tile)

    def _targets(self, x_rc: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
        """`(r, c)` each: the target's weight of each pair for the anchor of its row, and for that of its column."""
        first = self.batch.rows.start
        rows = slice(first + tile.rows.start, first + tile.rows.stop)
        part_rc = torch.ones_like(x_rc)
        left_out_rc = self.left_out(tile)
        if left_out_rc is not None:
            part_rc.masked_fill_(left_out_rc, 0)
        positive_rc = torch.zeros_like(x_rc)
        if self.positives:
            positive_rc += self.same(tile)
        tile.own(positive_rc)[0].fill_(1)
        if self.both_alike:
            row_rc = column_rc = positive_rc.mul_(part_rc * self.positive_weight_B[rows, None])
        else:
            positive_rc *= part_rc
            row_rc = positive_rc * self.positive_weight_B[rows, None]
            column_rc = positive_rc.mul_(self.positive_weight_B[None, tile.columns])
        row_rc = row_rc + part_rc * self.part_weight_B[rows, None]
        return row_rc, column_rc + part_rc * self.part_weight_B[None, tile.columns]

    def settle(self) -> bool:
        if self.spread:
            self.batch.sum_over_ranks(self.target_B)
        return super().settle()

    def loss(self) -> Tensor:
        row_n, column_n = self.sums.log_sums(self.batch)
        target_n, column_target_n = self.own_logit_n, self.own_logit_n
        if self.spread:
            target_n, column_target_n = self.target_n, self.target_B[self.batch.rows]
        return self.batch.mean_over_anchors((row_n - target_n + column_n - column_target_n) / 2)

    def slope(self, x_rc: Tensor, fixed_rc: Tensor | None, tile: Tile, fresh: bool) -> None:
        if not self.spread:
            return super().slope(x_rc, fixed_rc, tile, fresh)
        if fresh:
            self.exponentiate(x_rc, tile)
        self.multiply(x_rc, self.row_factor_n[tile.rows], self.column_factor_B[tile.columns])
        for target_rc in self._targets(x_rc, tile):
            x_rc.sub_(target_rc.mul_(self.share))


class InfoNCE(Loss):
    """`infonce` with its options bound; it has no parameters and no state."""

    function = staticmethod(infonce)

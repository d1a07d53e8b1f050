"""InfoNCE: each image finds its caption among all captions of the global batch, and each caption its image.

Legend: n rows of this rank, B rows in all, D feature width.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from contrastive.errors import UserError
from contrastive.losses.gather import check_same_caption, gather_batch

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
) -> dict[str, Tensor]:
    """Symmetric cross-entropy of `scale * image @ text.T`; arguments as in `contrastive.losses`.

    The mean over the B valid pairs and both directions of  -log(exp(t s_ii) / sum_j exp(t s_ij)),  with t the
    scale and s the similarities. (Printed without exp and t in some lecture notes: that form is a slip.)
    A bias common to all logits cancels out; its gradient is zero.

    same_caption says what two rows with equal `ids` are to one another:
      "negative": pushed apart like any two rows. Without `ids` this is the only choice;
          it equals `open_clip.ClipLoss` (on several ranks with `local_loss` and `gather_with_grad`).
      "ignore": left out of each other's denominators. The best choice where captions repeat.
      "positive": the target is uniform over all rows of the same id, as in supervised contrastive learning.
    label_smoothing: this share of the target is spread evenly over all columns that take part in the row.

    Returns "loss" and "accuracy" (the share of images whose most similar caption is theirs).
    Memory a rank: two n x B blocks and what backward keeps of them. Communication: the features, once.
    Raises UserError for shapes that do not fit, for `ids` missing where `same_caption` needs them.

    Source: van den Oord et al. 2018 (arXiv:1807.03748); Radford et al. 2021 (arXiv:2103.00020), figure 3;
    several positives: Khosla et al. 2020 (arXiv:2004.11362), equation 2.
    """
    check_same_caption(same_caption, CHOICES, ids)
    if not 0 <= label_smoothing < 1:
        raise UserError(f"label_smoothing {label_smoothing}: choose a share from 0 up to, not including, 1")
    with torch.autocast(image.device.type, enabled=False):
        batch = gather_batch(image, text, scale, bias, ids, group, valid)
        logits_image_nB = (batch.scale * batch.image_nD) @ batch.text_BD.T
        if batch.world == 1:
            logits_text_nB = logits_image_nB.T
        else:
            logits_text_nB = (batch.scale * batch.text_nD) @ batch.image_BD.T

        same_nB = None if same_caption == "negative" else batch.same_id()
        left_out = None if batch.valid_B is None else ~batch.valid_B[None, :]
        if same_caption == "ignore" and same_nB is not None:
            left_out = same_nB if left_out is None else same_nB | left_out
        if left_out is not None:
            # an infinite logit has no share in the softmax, and masked_fill stops its gradient
            logits_image_nB = logits_image_nB.masked_fill(left_out, -torch.inf)
            logits_text_nB = logits_text_nB.masked_fill(left_out, -torch.inf)

        if same_caption == "positive" or label_smoothing > 0:
            positive_nB = F.one_hot(batch.own, batch.image_BD.shape[0]).bool()
            if same_caption == "positive" and same_nB is not None:
                positive_nB = positive_nB | same_nB
            if left_out is None:
                left_out = torch.zeros_like(positive_nB)
            target_nB = (1 - label_smoothing) * _uniform(positive_nB & ~left_out, batch.scale.dtype)
            target_nB += label_smoothing * _uniform((~left_out).expand_as(positive_nB), batch.scale.dtype)
            per_anchor_n = _soft_cross_entropy(logits_image_nB, target_nB, left_out)
            per_anchor_n = per_anchor_n + _soft_cross_entropy(logits_text_nB, target_nB, left_out)
        else:
            positive_nB = None
            # the own column of a row that is not valid is left out; -100 is cross_entropy's "skip this row"
            target_n = batch.own if valid is None else batch.own.masked_fill(~valid, -100)
            per_anchor_n = F.cross_entropy(logits_image_nB, target_n, reduction="none")
            per_anchor_n = per_anchor_n + F.cross_entropy(logits_text_nB, target_n, reduction="none")

        loss = batch.keep_in_graph(batch.mean_over_anchors(per_anchor_n / 2))
        with torch.no_grad():
            best_n = logits_image_nB.argmax(dim=1)
            right_n = best_n == batch.own
            if positive_nB is not None:
                right_n = positive_nB.gather(1, best_n[:, None])[:, 0]
            return {"loss": loss, "accuracy": batch.mean_over_anchors(right_n.to(loss.dtype))}


def _uniform(mask_nB: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows that sum to 1, evenly over the columns in the mask; an empty row stays zero."""
    return mask_nB.to(dtype) / mask_nB.sum(dim=1, keepdim=True).clamp(min=1)


def _soft_cross_entropy(logits_nB: Tensor, target_nB: Tensor, left_out: Tensor) -> Tensor:
    # 0 * -inf is NaN: the columns that are left out have target 0, so any finite number serves in their place
    return -(target_nB * logits_nB.log_softmax(dim=1).masked_fill(left_out, 0)).sum(dim=1)


class InfoNCE(nn.Module):
    """`infonce` with its options bound; it has no parameters and no state."""

    def __init__(self, same_caption: str = "negative", label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.same_caption = same_caption
        self.label_smoothing = label_smoothing

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        bias: Tensor | None = None,
        ids: Tensor | None = None,
        group: dist.ProcessGroup | None = None,
        valid: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Call `infonce` with the bound options."""
        return infonce(
            image, text, scale, bias, ids, group, valid,
            same_caption=self.same_caption, label_smoothing=self.label_smoothing,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"same_caption={self.same_caption!r}, label_smoothing={self.label_smoothing}"

"""Margin (hinge, triplet) loss: every other caption stays at least a margin less similar than the right one.

Legend: n rows of this rank, B rows in all, D feature width.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from contrastive.errors import UserError
from contrastive.losses.gather import check_same_caption, gather_batch

CHOICES = ("negative", "ignore")


def margin(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    ids: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    valid: Tensor | None = None,
    *,
    margin: float = 0.2,
    hardest: bool = False,
    same_caption: str = "negative",
) -> dict[str, Tensor]:
    """Hinge on bare similarities, from images to captions and back; arguments as in `contrastive.losses`.

    The sum over i and j != i of  max(0, margin - s_ii + s_ij) + max(0, margin - s_ii + s_ji),  divided by the
    number B of valid pairs; with `hardest`, the largest term of each i and direction, not the sum (VSE++).
    Dividing by B, where the papers print the plain sum, keeps a learning rate and a clipping norm usable
    when the batch grows; the gradient has the same direction. pytorch-metric-learning's `TripletMarginLoss`
    with `CosineSimilarity` and `SumReducer`, added over both directions, is B times this.
    (The form margin + s_ii - s_ij of some lecture notes fits distances; here it would drive pairs apart.)

    The scale and the bias do not appear: the margin is measured in bare similarities, -1…1.
    Their gradients are zero.

    same_caption: "negative", or "ignore" to leave rows with equal `ids` out of each other's terms.
    hardest: sharper late in training, but it can stall from a random start: warm up with the sum.

    Returns "loss", "accuracy" (the share of images more similar to their caption than to any other)
    and "active" (the share of pairs with a term above zero; near 0 there is nothing left to learn from).
    Memory a rank: two n x B blocks and what backward keeps of them. Communication: the features, once.
    Raises UserError for shapes that do not fit, a negative margin, `ids` missing where they are needed.

    Source: Kiros et al. 2014 (arXiv:1411.2539), section 2.2; VSE++, Faghri et al. 2018 (arXiv:1707.05612),
    equation 6.
    """
    check_same_caption(same_caption, CHOICES, ids)
    if not margin >= 0:
        raise UserError(f"margin {margin}: choose a difference of similarities, from 0 to 2; 0.2 is usual")
    with torch.autocast(image.device.type, enabled=False):
        batch = gather_batch(image, text, scale, bias, ids, group, valid)
        similarity_image_nB = batch.image_nD @ batch.text_BD.T
        if batch.world == 1:
            similarity_text_nB = similarity_image_nB.T
        else:
            similarity_text_nB = batch.text_nD @ batch.image_BD.T
        own_n = (batch.image_nD * batch.text_nD).sum(dim=1)

        left_out = torch.zeros_like(similarity_image_nB, dtype=torch.bool)
        left_out.scatter_(1, batch.own[:, None], True)
        if batch.valid_B is not None:
            left_out |= ~batch.valid_B[None, :]
        if same_caption == "ignore":
            left_out |= batch.same_id()
        # a similarity of minus infinity violates no margin: the hinge and its gradient are zero there
        similarity_image_nB = similarity_image_nB.masked_fill(left_out, -torch.inf)
        similarity_text_nB = similarity_text_nB.masked_fill(left_out, -torch.inf)

        per_anchor_n = torch.zeros_like(own_n)
        for similarity_nB in (similarity_image_nB, similarity_text_nB):
            if hardest:
                per_anchor_n = per_anchor_n + (margin - own_n + similarity_nB.max(dim=1).values).relu()
            else:
                per_anchor_n = per_anchor_n + (margin - own_n[:, None] + similarity_nB).relu().sum(dim=1)

        loss = batch.keep_in_graph(batch.mean_over_anchors(per_anchor_n))
        with torch.no_grad():
            right_n = own_n > similarity_image_nB.max(dim=1).values
            return {
                "loss": loss,
                "accuracy": batch.mean_over_anchors(right_n.to(loss.dtype)),
                "active": batch.mean_over_anchors((per_anchor_n > 0).to(loss.dtype)),
            }


class Margin(nn.Module):
    """`margin` with its options bound; it has no parameters and no state."""

    def __init__(self, margin: float = 0.2, hardest: bool = False, same_caption: str = "negative") -> None:
        super().__init__()
        self.margin = margin
        self.hardest = hardest
        self.same_caption = same_caption

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
        """Call `margin` with the bound options."""
        return margin(
            image, text, scale, bias, ids, group, valid,
            margin=self.margin, hardest=self.hardest, same_caption=self.same_caption,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"margin={self.margin}, hardest={self.hardest}, same_caption={self.same_caption!r}"

"""SigLIP: every pair of the global batch is a yes-or-no question of its own.

Legend: n rows of this rank, B rows in all; r x c a tile, r of the n rows and c of the B columns.
"""

from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from contrastive.errors import UserError
from contrastive.losses.contract import Loss, check_same_caption, check_tiling, device_type
from contrastive.losses.gather import GlobalBatch, global_batch
from contrastive.losses.tiled import Kernel, Tile, exp_, tiled_loss

CHOICES = ("negative", "ignore", "positive")


def siglip(
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
    """Mean over pairs i of  sum_j softplus(-z_ij (t s_ij + b)),  z = 1 for partners, -1 otherwise.

    Arguments as in `contrastive.losses`; equals `open_clip.loss.SigLipLoss`. Terms need no sum over the others, so
    that the tiled way goes over the logits once and captions can travel in a ring without a statistic behind them.
    The bias is needed: at the start nearly all of the B^2 answers are no, and without it the first steps only
    learn that. Start the scale at 10 and the bias at -10, or at -ln(B - 1).

    same_caption says what two rows with equal `ids` are to one another: "negative", "ignore" (no question is asked of
    them) or "positive" (the answer is yes).

    Returns "loss" and "accuracy" (the share of images more similar to their caption than to any other; captions that
    are ignored or positives do not count as others).
    Raises UserError for a missing bias, for shapes that do not fit, for `ids` missing where they are needed.

    Source: Zhai et al. 2023 (arXiv:2303.15343), algorithm 1.
    """
    check_same_caption(same_caption, CHOICES)
    check_tiling(tile, exchange)
    with torch.autocast(device_type(image), enabled=False):
        also = partial(_check_bias, bias)
        batch = global_batch(image, text, scale, bias, ids, group, valid, check, same_caption, also=also)
        if tile is None:
            return _plain(batch, same_caption)
        loss, kernel = tiled_loss(batch, lambda b: SigLIPKernel(b, same_caption), tile=tile, exchange=exchange)
        return {"loss": loss, "accuracy": kernel.accuracy()}


def _check_bias(bias: Tensor | None) -> None:
    if bias is None:
        raise UserError("siglip needs a bias: without one it starts by pushing everything apart; start it at -10")


def _plain(batch: GlobalBatch, same_caption: str) -> dict[str, Tensor]:
    """The formula on `(n, B)` logits, with torch's own gradient. Rows only: a term belongs to one pair."""
    assert batch.bias is not None
    logits_nB = batch.scale * (batch.image_nD @ batch.features_of_all()[1].T) + batch.bias
    own_nB = F.one_hot(batch.own, batch.size).bool()
    yes_nB = own_nB | batch.same_id() if same_caption == "positive" else own_nB
    terms_nB = softplus(torch.where(yes_nB, -logits_nB, logits_nB))
    left_out_nB = torch.zeros_like(own_nB) if batch.valid_B is None else ~batch.valid_B[None, :]
    if same_caption == "ignore":
        left_out_nB = left_out_nB | batch.same_id()
    terms_nB = terms_nB.masked_fill(left_out_nB, 0)
    with torch.no_grad():
        own_n = logits_nB.masked_fill(left_out_nB | ~yes_nB, -torch.inf).amax(dim=1)
        right_n = own_n > logits_nB.masked_fill(left_out_nB | yes_nB, -torch.inf).amax(dim=1)
    return {
        "loss": batch.keep_in_graph(batch.mean_over_anchors(terms_nB.sum(dim=1))),
        "accuracy": batch.mean_over_anchors(right_n.to(logits_nB.dtype)),
    }


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)). torch's own turns linear at 20, which is 2e-9 off: too much for float64."""
    return F.softplus(x, threshold=40)


class SigLIPKernel(Kernel):
    """A sum of terms of one logit each: loss and slope in the same sweep."""

    sweeps = 1

    def __init__(self, batch: GlobalBatch, same_caption: str) -> None:
        super().__init__(batch, leave_out_same=same_caption == "ignore", positives=same_caption == "positive")
        self.total = batch.scale.new_zeros(())
        self.share = batch.world / batch.anchors
        self.scratch = [batch.scale.new_empty(0)]  # becomes two more tiles
        self.highest = 80.0 if batch.scale.dtype == torch.float32 else 700.0

    def slope(self, x_rc: Tensor, fixed_rc: Tensor | None, tile: Tile, fresh: bool) -> None:
        assert self.batch.bias is not None
        x_rc.add_(self.batch.bias)
        self.mask(x_rc, tile)  # softplus and sigmoid of minus infinity are 0
        self.note_own_and_best(x_rc, tile)
        own, _ = tile.own(x_rc)
        own_logit, own_yes = own.clone(), ~own.isneginf()
        # softplus(-x) = softplus(x) - x: what is a yes differs from a no by its logit
        self.total -= own_logit.masked_fill(~own_yes, 0).sum()
        yes_rc = None
        if self.positives:
            yes_rc = self.same(tile) & ~x_rc.isneginf()
            self.total -= x_rc.masked_fill(~yes_rc, 0).sum()
        self.total += self._softplus_then_sigmoid(x_rc)
        own.sub_(own_yes.to(own.dtype))
        if yes_rc is not None:
            x_rc.sub_(yes_rc.to(x_rc.dtype))
        x_rc.mul_(self.share)
        self.bias_slope += x_rc.sum()

    def _softplus_then_sigmoid(self, x_rc: Tensor) -> Tensor:
        """The sum of log(1 + e^x); sigmoid(x) in place of x.

        torch's softplus and log1p are not vectorised on a CPU and take longer than all else on the tile. This is
        log1p(v) = v log(w) / (w - 1) with w the rounded 1 + v (Goldberg 1991, theorem 4), v = e^x; where w would round
        to 1, the next number serves. All passes are vectorised.
        """
        if self.scratch[0].numel() < x_rc.numel():
            self.scratch = [torch.empty_like(x_rc).view(-1) for _ in range(2)]
        w_rc, log_rc = (tile[: x_rc.numel()].view_as(x_rc) for tile in self.scratch)
        # where e^x would overflow, softplus(x) is x
        beyond = torch.sub(x_rc, self.highest, out=w_rc).relu_().sum()
        v_rc = exp_(x_rc.clamp_(max=self.highest))
        torch.add(v_rc, 1, out=w_rc).clamp_(min=1 + torch.finfo(x_rc.dtype).eps)
        torch.log(w_rc, out=log_rc)
        log_rc.div_(w_rc.sub_(1)).mul_(v_rc)
        total = log_rc.sum() + beyond
        v_rc.div_(w_rc.add_(1))
        return total

    def loss(self) -> Tensor:
        return self.total * self.share


class SigLIP(Loss):
    """`siglip` with its options bound; it has no parameters and no state."""

    function = staticmethod(siglip)

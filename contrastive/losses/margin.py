"""Margin (hinge, triplet) loss: every other caption stays at least a margin less similar than the right one.

Legend: n rows of this rank, B rows in all; r x c a tile, r of the n rows and c of the B columns.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from contrastive.errors import UserError
from contrastive.losses.contract import Loss, check_number, check_same_caption, check_tiling, device_type
from contrastive.losses.gather import GlobalBatch, all_gather, global_batch
from contrastive.losses.tiled import Kernel, Tile, tiled_loss

CHOICES = ("negative", "ignore")
NEGATIVES = ("sum", "hardest", "semi-hard")
# Two pairs with one caption are equally similar to an image, up to rounding: a few eps, by the shape of the product.
# Semi-hard asks which is ahead; within so many eps none is.
TIE = 8


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
    negatives: str = "sum",
    hardness: float = 1.0,
    adaptive: float = 0.0,
    same_caption: str = "negative",
    tile: int | str | None = "auto",
    exchange: str = "auto",
    check: bool | None = None,
) -> dict[str, Tensor]:
    """Hinge on bare similarities, from images to captions and back; arguments as in `contrastive.losses`.

    Terms are  [margin - s_ii + s_ij]_+  of image i with caption j and  [margin - s_ii + s_ji]_+  of caption i with
    image j. `negatives` says which of them count:
      "sum": all; their sum divided by the number B of valid pairs. Dividing, where the papers print the plain sum,
          keeps a learning rate and a clipping norm usable when the batch grows; the direction is the same.
          pytorch-metric-learning's `TripletMarginLoss` with `CosineSimilarity` and `SumReducer`, added over both
          directions, is B times this.
      "hardest": the largest of each i and direction (VSE++), divided by B. It can stall from a random start: warm up
          with the sum, by `hardness`.
      "semi-hard": those of negatives behind the partner by less than the margin,  s_ii - margin < s_ij < s_ii; the
          mean of each direction's terms, added (pytorch-metric-learning's semi-hard miner, mean of the non-zero).
    (The form margin + s_ii - s_ij of some lecture notes fits distances; here it would drive pairs apart.)

    The scale and the bias do not appear: the margin is measured in bare similarities, -1 to 1.
    Their gradients are zero.

    hardness: of "hardest", how much of it there is: (1 - hardness) * sum + hardness * hardest.
    adaptive: 0 to 1; the margin between i and j becomes  margin * (1 - adaptive * max(0, cos(text_i, text_j))),
        without a gradient, so that captions that say nearly the same need not be told apart.
    same_caption: "negative", or "ignore" to leave rows with equal `ids` out of each other's terms.

    Returns "loss", "accuracy" (the share of images more similar to their caption than to any other)
    and "active" (the share of pairs with a term above zero; near 0 there is nothing left to learn from).
    Raises UserError for shapes that do not fit, an option out of range, `ids` missing where they are needed.

    Source: Kiros et al. 2014 (arXiv:1411.2539), section 2.2; hardest: Faghri et al. 2018, VSE++ (arXiv:1707.05612),
    equation 6; semi-hard: Schroff et al. 2015, FaceNet (arXiv:1503.03832), section 3.2. Margins that follow the
    similarity of what is told apart: Li et al. 2020 (arXiv:2005.13826); this form is our own.
    """
    check_same_caption(same_caption, CHOICES)
    check_tiling(tile, exchange)
    check_number("margin", margin, 0, 2, "choose a difference of similarities, from 0 to 2; 0.2 is usual")
    if negatives not in NEGATIVES:
        raise UserError(f"negatives {negatives!r}: choose one of {', '.join(NEGATIVES)}")
    for name, value in (("hardness", hardness), ("adaptive", adaptive)):
        check_number(name, value, 0, 1, "choose a share from 0 to 1")
    if negatives != "hardest":
        if hardness != 1:
            raise UserError(
                f"hardness {hardness} does nothing for {negatives!r} negatives; choose 'hardest', or leave it"
            )
        hardness = 0.0
    with torch.autocast(device_type(image), enabled=False):
        whole = global_batch(image, text, scale, bias, ids, group, valid, check, same_caption)
        batch = whole.with_scale(torch.ones_like(whole.scale))
        options = (margin, negatives, hardness, adaptive, same_caption == "ignore")
        if tile is None:
            result = _plain(batch, *options)
        else:
            text_nD = batch.text_nD.detach()
            fixed = (text_nD, text_nD) if adaptive else None
            loss, kernel = tiled_loss(batch, lambda b: _kernel(b, *options), tile=tile, exchange=exchange, fixed=fixed)
            result = {"loss": loss, "accuracy": kernel.accuracy(), "active": kernel.active()}
        return result | {"loss": whole.keep_in_graph(result["loss"])}


def _plain(
    batch: GlobalBatch, margin: float, negatives: str, hardness: float, adaptive: float, leave_out_same: bool
) -> dict[str, Tensor]:
    """The formula on `(n, B)` similarities, with torch's own gradient."""
    similarity_image_nB, similarity_text_nB = batch.similarities()
    own_n = (batch.image_nD * batch.text_nD).sum(dim=1)

    left_out_nB = torch.zeros_like(similarity_image_nB, dtype=torch.bool)
    left_out_nB.scatter_(1, batch.own[:, None], True)
    if batch.valid_B is not None:
        left_out_nB |= ~batch.valid_B[None, :]
    if leave_out_same:
        left_out_nB |= batch.same_id()
    margin_nB: Tensor | float = margin
    if adaptive:
        with torch.no_grad():
            alike_nB = batch.text_nD @ batch.features_of_all()[1].T
            margin_nB = margin * (1 - adaptive * alike_nB.clamp(min=0))

    loss, active_n = torch.zeros_like(batch.scale), torch.zeros_like(own_n, dtype=torch.bool)
    for similarity_nB in (similarity_image_nB, similarity_text_nB):
        # a similarity of minus infinity violates no margin: the hinge and its gradient are zero there
        lead_nB = own_n[:, None] - similarity_nB.masked_fill(left_out_nB, -torch.inf)
        hinge_nB = (margin_nB - lead_nB).relu()
        if negatives == "semi-hard":
            if batch.valid_n is not None:
                hinge_nB = hinge_nB.masked_fill(~batch.valid_n[:, None], 0)
            hinge_nB = hinge_nB.masked_fill(lead_nB <= TIE * torch.finfo(lead_nB.dtype).eps, 0)
            count = batch.sum_over_ranks((hinge_nB > 0).sum())
            loss = loss + hinge_nB.sum() * batch.world / count.clamp(min=1)
        else:
            per_anchor_n = (1 - hardness) * hinge_nB.sum(dim=1) + hardness * hinge_nB.max(dim=1).values
            loss = loss + batch.mean_over_anchors(per_anchor_n)
        active_n |= (hinge_nB > 0).any(dim=1)
    with torch.no_grad():
        right_n = own_n > similarity_image_nB.masked_fill(left_out_nB, -torch.inf).amax(dim=1)
        return {
            "loss": loss,
            "accuracy": batch.mean_over_anchors(right_n.to(own_n.dtype)),
            "active": batch.mean_over_anchors(active_n.to(own_n.dtype)),
        }


def _kernel(
    batch: GlobalBatch, margin: float, negatives: str, hardness: float, adaptive: float, leave_out_same: bool
) -> "SumKernel":
    if negatives == "semi-hard":
        return SemiHardKernel(batch, margin, adaptive, leave_out_same)
    if hardness == 0:
        return SumKernel(batch, margin, adaptive, leave_out_same)
    return HardestKernel(batch, margin, adaptive, leave_out_same, hardness)


class SumKernel(Kernel):
    """All hinges of rows and columns. What is left out has a similarity of minus infinity and violates no margin."""

    sweeps = 1

    def __init__(self, batch: GlobalBatch, margin: float, adaptive: float, leave_out_same: bool) -> None:
        super().__init__(batch, leave_out_same=leave_out_same)
        self.margin, self.adaptive = margin, adaptive
        self.share = batch.world / batch.anchors
        own_n = (batch.image_nD * batch.text_nD).sum(dim=1)
        self.anchor_n, self.anchor_B = own_n, own_n if batch.world == 1 else all_gather(own_n, batch.group)
        # Sums of the terms of each anchor, and numbers of those above zero: images, and captions of all ranks.
        self.sum_n, self.count_n = torch.zeros_like(own_n), torch.zeros_like(own_n)
        self.sum_B, self.count_B = batch.scale.new_zeros(2, batch.size).unbind()

    def hinges(self, x_rc: Tensor, fixed_rc: Tensor | None, tile: Tile) -> tuple[Tensor, Tensor]:
        """`(r, c)` each: the terms of the rows' anchors and those of the columns'."""
        margin_rc: Tensor | float = self.margin
        if fixed_rc is not None:
            margin_rc = self.margin * (1 - self.adaptive * fixed_rc.clamp(min=0))
        row_rc = (margin_rc - (self.anchor_n[tile.rows, None] - x_rc)).relu_()
        return row_rc, (margin_rc - (self.anchor_B[None, tile.columns] - x_rc)).relu_()

    def leave_out(self, x_rc: Tensor, tile: Tile) -> None:
        """Minus infinity for pairs that are no negatives."""
        self.mask(x_rc, tile)
        self.note_own_and_best(x_rc, tile)
        tile.own(x_rc)[0].fill_(-torch.inf)

    def add(self, row_rc: Tensor, column_rc: Tensor, tile: Tile) -> None:
        self.sum_n[tile.rows] += row_rc.sum(dim=1)
        self.sum_B[tile.columns] += column_rc.sum(dim=0)
        self.count_n[tile.rows] += (row_rc > 0).sum(dim=1)
        self.count_B[tile.columns] += (column_rc > 0).sum(dim=0)

    def complete(self) -> None:
        """Add up over ranks what was collected of the columns."""
        self.sum_B, self.count_B = self.batch.sum_over_ranks(torch.stack([self.sum_B, self.count_B])).unbind()

    def slope(self, x_rc: Tensor, fixed_rc: Tensor | None, tile: Tile, fresh: bool) -> None:
        self.leave_out(x_rc, tile)
        row_rc, column_rc = self.hinges(x_rc, fixed_rc, tile)
        self.add(row_rc, column_rc, tile)
        x_rc.copy_(row_rc > 0).add_(column_rc > 0).mul_(self.share)

    def finish(self) -> None:
        self.complete()

    def own_slope(self) -> Tensor:
        """A term that counts pulls its anchor's partner as much as it pushes the negative."""
        return -(self.count_n + self.count_B[self.batch.rows]) * self.share

    def loss(self) -> Tensor:
        return self.batch.mean_over_anchors(self.sum_n + self.sum_B[self.batch.rows])

    def active(self) -> Tensor:
        """The share of pairs with a term above zero."""
        active_n = self.count_n + self.count_B[self.batch.rows] > 0
        return self.batch.mean_over_anchors(active_n.to(self.sum_n.dtype))


class SemiHardKernel(SumKernel):
    """Hinges of the negatives behind the partner; a direction's mean needs their number before the slope."""

    sweeps = 2

    def hinges(self, x_rc: Tensor, fixed_rc: Tensor | None, tile: Tile) -> tuple[Tensor, Tensor]:
        row_rc, column_rc = super().hinges(x_rc, fixed_rc, tile)
        tie = TIE * torch.finfo(x_rc.dtype).eps
        row_rc.masked_fill_(x_rc >= self.anchor_n[tile.rows, None] - tie, 0)
        column_rc.masked_fill_(x_rc >= self.anchor_B[None, tile.columns] - tie, 0)
        return row_rc, column_rc

    def observe(self, x_rc: Tensor, fixed_rc: Tensor | None, tile: Tile) -> None:
        self.leave_out(x_rc, tile)
        self.add(*self.hinges(x_rc, fixed_rc, tile), tile)

    def settle(self) -> bool:
        self.complete()
        rows = self.batch.sum_over_ranks(torch.stack([self.sum_n.sum(), self.count_n.sum()]))
        self.image_share = self.batch.world / rows[1].clamp(min=1)
        self.text_share = self.batch.world / self.count_B.sum().clamp(min=1)
        return True

    def slope(self, x_rc: Tensor, fixed_rc: Tensor | None, tile: Tile, fresh: bool) -> None:
        if fresh:
            self.leave_out(x_rc, tile)
        row_rc, column_rc = self.hinges(x_rc, fixed_rc, tile)
        x_rc.copy_(row_rc > 0).mul_(self.image_share).add_((column_rc > 0) * self.text_share)

    def finish(self) -> None:
        pass  # `settle` has completed the sums

    def own_slope(self) -> Tensor:
        return -(self.count_n * self.image_share + self.count_B[self.batch.rows] * self.text_share)

    def loss(self) -> Tensor:
        return self.sum_n.sum() * self.image_share + self.sum_B[self.batch.rows].sum() * self.text_share


class HardestKernel(SumKernel):
    """The largest hinge of each anchor, mixed with the sum of all."""

    sweeps = 2

    def __init__(
        self, batch: GlobalBatch, margin: float, adaptive: float, leave_out_same: bool, hardness: float
    ) -> None:
        super().__init__(batch, margin, adaptive, leave_out_same)
        self.hardness = hardness
        self.best_term_n, self.best_term_B = torch.zeros_like(self.sum_n), torch.zeros_like(self.sum_B)
        # Where the largest term is: its column or row in the global batch; -1 where no term is above zero.
        self.at_n = torch.full_like(self.sum_n, -1, dtype=torch.int64)
        self.at_B = torch.full_like(self.sum_B, -1, dtype=torch.int64)

    def observe(self, x_rc: Tensor, fixed_rc: Tensor | None, tile: Tile) -> None:
        self.leave_out(x_rc, tile)
        row_rc, column_rc = self.hinges(x_rc, fixed_rc, tile)
        self.add(row_rc, column_rc, tile)
        _keep_largest(row_rc, 1, tile.columns.start, self.best_term_n[tile.rows], self.at_n[tile.rows])
        first = self.batch.rows.start + tile.rows.start
        _keep_largest(column_rc, 0, first, self.best_term_B[tile.columns], self.at_B[tile.columns])

    def settle(self) -> bool:
        self.complete()
        if self.batch.world > 1:
            # of a column's largest terms on the ranks, the first largest one counts
            of_ranks_WB = all_gather(self.best_term_B[None], self.batch.group)
            self.best_term_B, keeper_B = of_ranks_WB.max(dim=0)
            self.at_B.masked_fill_(keeper_B != self.batch.rank, -1)
        return True

    def slope(self, x_rc: Tensor, fixed_rc: Tensor | None, tile: Tile, fresh: bool) -> None:
        if self.hardness < 1:
            if fresh:
                self.leave_out(x_rc, tile)
            row_rc, column_rc = self.hinges(x_rc, fixed_rc, tile)
            x_rc.copy_(row_rc > 0).add_(column_rc > 0).mul_((1 - self.hardness) * self.share)
        else:
            x_rc.zero_()
        at_r = self.at_n[tile.rows] - tile.columns.start
        rows = ((at_r >= 0) & (at_r < x_rc.shape[1])).nonzero()[:, 0]
        x_rc[rows, at_r[rows]] += self.hardness * self.share
        at_c = self.at_B[tile.columns] - (self.batch.rows.start + tile.rows.start)
        columns = ((at_c >= 0) & (at_c < x_rc.shape[0])).nonzero()[:, 0]
        x_rc[at_c[columns], columns] += self.hardness * self.share

    def finish(self) -> None:
        pass  # `settle` has completed the sums

    def own_slope(self) -> Tensor:
        best_n = (self.best_term_n > 0).to(self.sum_n.dtype) + (self.best_term_B[self.batch.rows] > 0)
        return (1 - self.hardness) * super().own_slope() - self.hardness * best_n * self.share

    def loss(self) -> Tensor:
        best_n = self.best_term_n + self.best_term_B[self.batch.rows]
        return (1 - self.hardness) * super().loss() + self.hardness * self.batch.mean_over_anchors(best_n)


def _keep_largest(term_rc: Tensor, dim: int, first: int, best: Tensor, at: Tensor) -> None:
    """Put the largest terms along `dim` into `best`, and their places, counted from `first`, into `at`."""
    value, place = term_rc.max(dim=dim)
    better = value > best
    best.copy_(torch.where(better, value, best))
    at.copy_(torch.where(better, place + first, at))


class Margin(Loss):
    """`margin` with its options bound, and a warm-up from the sum to the hardest negative.

    Args:
        warmup_steps: of "hardest": the number of training steps in which `hardness` grows from 0 to its value. They are
            counted in a buffer, ``steps``, which checkpoints hold. The other arguments are those of `margin`.
    """

    function = staticmethod(margin)
    steps: Tensor

    def __init__(self, warmup_steps: int = 0, **options: Any) -> None:
        super().__init__(**options)
        if warmup_steps < 0 or warmup_steps and options.get("negatives") != "hardest":
            raise UserError(f"warmup_steps {warmup_steps}: only 'hardest' negatives have a warm-up, of 0 or more steps")
        self.warmup_steps, self.hardness = warmup_steps, options.get("hardness", 1.0)
        if warmup_steps:
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, *arguments: Any, **keywords: Any) -> dict[str, Tensor]:
        """Call `margin` with the bound options, at the hardness of this step."""
        options: dict[str, Any] = dict(self.options)
        if self.warmup_steps:
            options["hardness"] = self.hardness * min(1.0, int(self.steps) / self.warmup_steps)
            if self.training:
                self.steps += 1
        return margin(*arguments, **(keywords | options))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, warmup_steps={self.warmup_steps}"

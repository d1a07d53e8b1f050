"""What the losses share that normalise by sums of exponentials over the rows and the columns of the logits.

Legend: n rows of this rank, B rows in all; r x c a tile, r of the n rows and c of the B columns.
"""

import math

import torch
from torch import Tensor

from contrastive.losses import fused
from contrastive.losses.gather import GlobalBatch
from contrastive.losses.tiled import Kernel, Tile, exp_

# float32 holds e^-87 to e^88. The largest logit of normalised features, the scale, is put at e^60 or below: so a factor
# of 1 / (2 B sum) stays a normal number for sums over e^13 columns of equal logits. A sum of at least e^-60 has lost
# nothing that float32 could hold to what lies below e^-87. float64 holds e^-708 to e^709.
HIGHEST = {torch.float32: 60.0, torch.float64: 600.0}
LOWEST = {torch.float32: -60.0, torch.float64: -600.0}


class Exponentials:
    """Sums of exp(logit) over each row and column, under one shift for all logits.

    A softmax usually takes a row's maximum for its shift. With one for all, a single exponential serves the row and the
    column in both sweeps, and ranks add up their column sums as they are. The price is that sums can leave the range of
    the number format, for logits far apart; `settle` says so.
    """

    def __init__(self, batch: GlobalBatch, scale: Tensor) -> None:
        self.row_sum_n = scale.new_zeros(batch.image_nD.shape[0])
        self.column_sum_B = scale.new_zeros(batch.size)
        self.shift = (scale - HIGHEST[scale.dtype]).clamp(min=0)
        self.shifts = scale.device.type != "cpu" or bool(self.shift > 0)  # to ask an accelerator is to wait for it

    def exp(self, x_rc: Tensor) -> None:
        """exp(logit - shift) in place."""
        if self.shifts:
            x_rc.sub_(self.shift)
        exp_(x_rc)

    def add(self, exp_rc: Tensor, tile: Tile) -> None:
        self.row_sum_n[tile.rows] += exp_rc.sum(dim=1)
        self.column_sum_B[tile.columns] += exp_rc.sum(dim=0)

    def settle(self, batch: GlobalBatch, counted_B: Tensor) -> Tensor:
        """Add up the column sums over ranks; 0-d bool, alike on all ranks: every sum that counts is in range."""
        row_wrong = (self._wrong(self.row_sum_n) & counted_B[batch.rows]).any()
        both = torch.cat([self.column_sum_B, row_wrong.to(self.column_sum_B.dtype)[None]])
        batch.sum_over_ranks(both)
        self.column_sum_B = both[:-1]
        return ~(self._wrong(self.column_sum_B) & counted_B).any() & (both[-1] == 0)

    @staticmethod
    def _wrong(sums: Tensor) -> Tensor:
        # NaN is not for float64 to mend: it goes on to the loss, where the trainer stops on it on all ranks alike
        return (sums < math.exp(LOWEST[sums.dtype])) | sums.isposinf()

    def log_sums(self, batch: GlobalBatch) -> tuple[Tensor, Tensor]:
        """`(n,)` each: log of the sum of exp(logit) over a pair's row and over its column."""
        return self.row_sum_n.log() + self.shift, self.column_sum_B[batch.rows].log() + self.shift


class SoftmaxKernel(Kernel):
    """A loss of the log-sums of rows and columns, with a slope  exp(logit) * (row factor + column factor).

    Args:
        leave_out_own: a pair's own logit is in no sum (DCL and what is made from it).
    """

    def __init__(
        self, batch: GlobalBatch, *, leave_out_same: bool = False, positives: bool = False, leave_out_own: bool = False
    ) -> None:
        super().__init__(batch, leave_out_same=leave_out_same, positives=positives)
        self.leave_out_own = leave_out_own
        self.sums = Exponentials(batch, batch.scale)
        self.own_logit_n = torch.zeros_like(self.own_n)
        self.weight = batch.scale.new_empty(0)  # a second tile
        if leave_out_own:
            # a pair without negatives has no term
            self.counted_B = batch.negatives(leave_out_same=leave_out_same) > 0
        elif batch.valid_B is not None:
            self.counted_B = batch.valid_B
        else:
            self.counted_B = torch.ones(batch.size, dtype=torch.bool, device=batch.scale.device)
        self.counted_n = self.counted_B[batch.rows]

    def observe(self, x_rc: Tensor, fixed_rc: Tensor | None, tile: Tile) -> None:
        own, rows = tile.own(x_rc)
        self.own_logit_n[rows] = own
        if fused.serves(x_rc) and not self.positives:
            self._observe_fused(x_rc, tile)
            return
        self.exponentiate(x_rc, tile)
        self.note_own_and_best(x_rc, tile)
        if self.leave_out_own:
            own.zero_()
        self.sums.add(x_rc, tile)

    def _observe_fused(self, x_rc: Tensor, tile: Tile) -> None:
        """The same in one pass for all pairs but those with themselves, which are no rivals of themselves."""
        self.mask(x_rc, tile)
        own, rows = tile.own(x_rc)
        own_exp, sums = own.clone(), self.sums
        sums.exp(own_exp)
        own.fill_(-torch.inf)
        row_sum_r, column_sum_c = sums.row_sum_n[tile.rows], sums.column_sum_B[tile.columns]
        fused.exp_sums_(x_rc, float(sums.shift), row_sum_r, column_sum_c, self.best_n[tile.rows])
        own.copy_(own_exp)
        self.own_n[rows] = torch.maximum(self.own_n[rows], own_exp)
        if not self.leave_out_own:
            sums.row_sum_n[rows] += own_exp
            sums.column_sum_B[rows.start + tile.first_own : rows.stop + tile.first_own] += own_exp

    def exponentiate(self, x_rc: Tensor, tile: Tile) -> None:
        self.mask(x_rc, tile)
        self.sums.exp(x_rc)

    def settle(self) -> bool:
        in_range = bool(self.sums.settle(self.batch, self.counted_B))
        if in_range:
            self.row_factor_n, self.column_factor_B = self.factors()
            self.own_factor_n = self.own_factor()
        return in_range

    def slope(self, x_rc: Tensor, fixed_rc: Tensor | None, tile: Tile, fresh: bool) -> None:
        own, rows = tile.own(x_rc)
        row_r, column_c = self.row_factor_n[tile.rows], self.column_factor_B[tile.columns]
        if fused.serves(x_rc):
            if fresh:
                self.mask(x_rc, tile)
            fused.exp_slope_(x_rc, float(self.sums.shift), row_r, column_c, fresh)
        else:
            if fresh:
                self.exponentiate(x_rc, tile)
            self.multiply(x_rc, row_r, column_c)
        if self.leave_out_own:
            own.zero_()
        # inside the tile, where it meets the own logit's share in the sums: p - 1 is small in a trained model
        own.sub_(self.own_factor_n[rows])

    def multiply(self, x_rc: Tensor, row_r: Tensor, column_c: Tensor) -> None:
        """x * (row + column), in place."""
        if self.weight.numel() < x_rc.numel():
            self.weight = torch.empty_like(x_rc).view(-1)
        weight_rc = self.weight[: x_rc.numel()].view_as(x_rc)
        x_rc.mul_(torch.add(row_r[:, None], column_c[None, :], out=weight_rc))

    @property
    def share(self) -> Tensor | float:
        """What one anchor and direction weighs in the mean over anchors and both directions, times W."""
        return self.batch.world / (2 * self.batch.anchors)

    # ---- the shares of the plain softmax; a loss of its own overrides them

    def factors(self) -> tuple[Tensor, Tensor]:
        """`(n,)` and `(B,)`: what an exponential is multiplied with, by row and by column."""
        row_n = (self.share / self.sums.row_sum_n).masked_fill(~self.counted_n, 0)
        return row_n, (self.share / self.sums.column_sum_B).masked_fill(~self.counted_B, 0)

    def own_factor(self) -> Tensor:
        """`(n,)`: minus the slope of a pair's own logit beside its share in the sums."""
        return self.counted_n.to(self.own_n.dtype) * self.share * 2

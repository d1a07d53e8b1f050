"""SogCLR and FastCLIP: the denominator is a moving average per sample, so that small batches act like large ones.

Legend: n rows of this rank, B rows in all, S samples of the data set.
"""

import math
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from contrastive.errors import UserError
from contrastive.losses.contract import (
    LARGEST_FLOAT,
    SMALLEST_FLOAT,
    Loss,
    check_number,
    check_same_caption,
    check_samples,
    check_tiling,
    device_type,
)
from contrastive.losses.dcl import CHOICES, log_sums_of_negatives
from contrastive.losses.gather import GlobalBatch, all_gather, global_batch, refusing_alike
from contrastive.losses.softmax import SoftmaxKernel
from contrastive.losses.tiled import tiled_loss


def sogclr(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    ids: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    valid: Tensor | None = None,
    *,
    log_u: Tensor,
    gamma: float = 0.9,
    epsilon: float = 1e-14,
    rho: float | None = None,
    same_caption: str = "negative",
    tile: int | str | None = "auto",
    exchange: str = "auto",
    check: bool | None = None,
) -> dict[str, Tensor]:
    """The global contrastive objective with moving averages; arguments as in `contrastive.losses`.

    With  g_i = mean over negatives j of exp(t (s_ij - s_ii))  of a row, and likewise of a column, a sample's averages
    become  u_i = (1 - gamma) u_i + gamma g_i  (g_i itself at its first visit), and the gradient is that of
    tau g_i / (epsilon + u_i)  with u held still, averaged over pairs and both directions; tau = 1 / t. The value
    returned is the objective's estimate,  tau log(epsilon + u_i). With gamma = 1 the gradient is tau times that of
    `dcl`.

    log_u: `(n, 2)`, the logarithms of these rows' averages, of images and of captions; -inf where there is none yet.
    gamma: how much of an average is replaced at a visit, above 0, at most 1.
    rho: None keeps the temperature fixed (SogCLR; the scale's gradient is zero). A number learns it, on the objective
        tau (log(epsilon + u_i) + rho)  (FastCLIP-v3); it holds the temperature up, 6.5 to 11 in the paper.

    Returns "loss", "accuracy" and "log_u", the `(n, 2)` new averages (`SogCLR` keeps them and logs the rest).
    Raises UserError for gamma or epsilon out of range and for what the other losses refuse.

    Source: Yuan et al. 2022, SogCLR (arXiv:2202.12387), algorithm 1; Wei et al. 2024, FastCLIP (arXiv:2407.01445),
    equations 1 to 6.
    """
    check_same_caption(same_caption, CHOICES)
    check_tiling(tile, exchange)
    check_number("gamma", gamma, 1e-9, 1, "choose how much of an average a visit replaces, above 0 and at most 1")
    check_number("epsilon", epsilon, SMALLEST_FLOAT, 1, "choose a small number above 0, 1e-14 is usual")
    if rho is not None:
        check_number(
            "rho", rho, -LARGEST_FLOAT, LARGEST_FLOAT, "choose a finite number, 6.5 to 11 in the paper, or None"
        )
    with torch.autocast(device_type(image), enabled=False):
        also = partial(_check_averages, log_u, len(image))
        whole = global_batch(image, text, scale, bias, ids, group, valid, check, same_caption, also=also)
        leave_out_same = same_caption == "ignore"
        batch = whole if rho is not None else whole.with_scale(whole.scale.detach())
        settings = (gamma, epsilon, rho)
        if tile is None:
            result = _plain(batch, leave_out_same, log_u.detach(), *settings)
        else:
            loss, kernel = tiled_loss(
                batch, lambda b: SogCLRKernel(b, leave_out_same, log_u, *settings), tile=tile, exchange=exchange
            )
            result = {"loss": loss, "accuracy": kernel.accuracy(), "log_u": kernel.log_u_n2.to(log_u.dtype)}
        return result | {"loss": whole.keep_in_graph(result["loss"])}


def _check_averages(log_u: Tensor, rows: int) -> None:
    if not isinstance(log_u, Tensor) or log_u.shape != (rows, 2):
        shown = tuple(log_u.shape) if isinstance(log_u, Tensor) else type(log_u).__name__
        raise UserError(f"log_u {shown}: pass two averages a pair, ({rows}, 2)")


def _update(log_u_n2: Tensor, log_g_n2: Tensor, gamma: float) -> Tensor:
    """The new averages, in logarithms: g runs over many orders of magnitude."""
    if gamma == 1:
        return log_g_n2
    moved = torch.logaddexp(log_u_n2 + math.log1p(-gamma), log_g_n2 + math.log(gamma))
    return torch.where(log_u_n2.isneginf(), log_g_n2, moved)


def _log_plus(log_u: Tensor, epsilon: float) -> Tensor:
    """log(epsilon + u)"""
    return torch.logaddexp(log_u, torch.full_like(log_u, math.log(epsilon)))


def _plain(
    batch: GlobalBatch, leave_out_same: bool, log_u_n2: Tensor, gamma: float, epsilon: float, rho: float | None
) -> dict[str, Tensor]:
    """The formula on `(n, B)` logits, with torch's own gradient."""
    own_n, log_sums, accuracy = log_sums_of_negatives(batch, leave_out_same)
    negatives_n1 = batch.negatives(leave_out_same=leave_out_same)[batch.rows, None]
    counted_n1 = negatives_n1 > 0
    log_g_n2 = torch.stack(log_sums, dim=1) - own_n[:, None] - negatives_n1.clamp(min=1).to(own_n.dtype).log()
    new_n2 = _update(log_u_n2.to(log_g_n2.dtype), log_g_n2.detach(), gamma)
    new_n2 = torch.where(counted_n1, new_n2, log_u_n2.to(new_n2.dtype))
    log_divisor_n2 = _log_plus(new_n2, epsilon)
    # tau g / (epsilon + u) has the gradient, tau log(epsilon + u) the value; only the latter's tau is differentiated
    surrogate_n2 = (log_g_n2 - log_divisor_n2).masked_fill(~counted_n1, -torch.inf).exp()
    surrogate_n2 = (surrogate_n2 - surrogate_n2.detach()) / batch.scale.detach()
    value_n2 = ((log_divisor_n2 + (rho or 0.0)) / batch.scale).masked_fill(~counted_n1, 0)
    loss = batch.mean_over_anchors((value_n2 + surrogate_n2).mean(dim=1))
    return {"loss": loss, "accuracy": accuracy, "log_u": new_n2.to(log_u_n2.dtype)}


class SogCLRKernel(SoftmaxKernel):
    """DCL whose shares are those of g in epsilon + u, times tau."""

    def __init__(
        self,
        batch: GlobalBatch,
        leave_out_same: bool,
        log_u_n2: Tensor,
        gamma: float,
        epsilon: float,
        rho: float | None,
    ) -> None:
        super().__init__(batch, leave_out_same=leave_out_same, leave_out_own=True)
        self.log_u_n2 = log_u_n2.to(batch.scale.dtype)
        self.gamma, self.epsilon, self.rho = gamma, epsilon, rho
        negatives_B = batch.negatives(leave_out_same=leave_out_same)
        self.log_negatives_n = negatives_B[batch.rows].clamp(min=1).to(batch.scale.dtype).log()

    def factors(self) -> tuple[Tensor, Tensor]:
        batch, counted_n1 = self.batch, self.counted_n[:, None]
        log_sums_n2 = torch.stack(self.sums.log_sums(batch), dim=1)
        log_g_n2 = log_sums_n2 - self.own_logit_n[:, None] - self.log_negatives_n[:, None]
        self.log_u_n2 = torch.where(counted_n1, _update(self.log_u_n2, log_g_n2, self.gamma), self.log_u_n2)
        self.log_divisor_n2 = _log_plus(self.log_u_n2, self.epsilon)
        # share of g in epsilon + u: at most 1 / gamma
        self.part_n2 = (log_g_n2 - self.log_divisor_n2).exp().masked_fill(~counted_n1, 0) / batch.scale
        row_n, column_B = super().factors()
        column_part_n = self.part_n2[:, 1]
        column_part_B = all_gather(column_part_n, batch.group) if batch.world > 1 else column_part_n
        return row_n * self.part_n2[:, 0], column_B * column_part_B

    def own_factor(self) -> Tensor:
        return self.part_n2.sum(dim=1) * self.share

    def _objective(self) -> Tensor:
        """log(epsilon + u) + rho, this rank's share in its mean."""
        value_n2 = (self.log_divisor_n2 + (self.rho or 0.0)).masked_fill(~self.counted_n[:, None], 0)
        return self.batch.mean_over_anchors(value_n2.mean(dim=1))

    def loss(self) -> Tensor:
        return self._objective() / self.batch.scale

    def scale_slope(self) -> Tensor:
        return -self._objective() / self.batch.scale**2


class SogCLR(Loss):
    """`sogclr` with its averages, one pair of them for each sample of the data set.

    Args:
        samples: the size S of the data set. The other arguments are those of `sogclr`.

    The averages are a buffer, ``log_u (S, 2)`` float32: 8 bytes a sample, the same on every rank, saved in checkpoints.
    Their key is the batch's ``samples``, the number of each pair in the data set, which stays the same from epoch to
    epoch and from one number of processes to another. In evaluation mode nothing is written.
    """

    function = staticmethod(sogclr)
    needs = ("samples",)
    log_u: Tensor

    def __init__(self, samples: int, **options: object) -> None:
        super().__init__(**options)
        if samples < 1:
            raise UserError(f"samples {samples}: give the size of the data set, at least 1")
        self.register_buffer("log_u", torch.full((samples, 2), -torch.inf))

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        bias: Tensor | None = None,
        ids: Tensor | None = None,
        group: dist.ProcessGroup | None = None,
        valid: Tensor | None = None,
        *,
        samples: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Call `sogclr` with the averages of these rows, and keep the new ones.

        samples: `(n,)` int64, the number of each pair in the data set.
        """
        with refusing_alike(image, text, scale, ids, valid, group, self.options.get("check")):
            check_samples("sogclr", samples, len(image), len(self.log_u))
        assert samples is not None
        samples = samples.to(self.log_u.device)
        result = sogclr(
            image, text, scale, bias, ids, group, valid, log_u=self.log_u[samples].to(image.device), **self.options
        )
        log_u_n2 = result.pop("log_u")
        if self.training:
            self._keep(samples, log_u_n2, valid, group)
        return result

    @torch.no_grad()
    def _keep(self, samples: Tensor, log_u_n2: Tensor, valid: Tensor | None, group: dist.ProcessGroup | None) -> None:
        """Write the new averages of all ranks' rows, so that every rank holds all of them."""
        written = torch.ones_like(samples, dtype=torch.bool) if valid is None else valid.to(samples.device)
        # a step whose features are no numbers changes nothing, here neither
        written = written & ~log_u_n2.isnan().any(dim=1).to(samples.device)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1:
            samples = all_gather(torch.where(written, samples, -1), group)
            log_u_n2, written = all_gather(log_u_n2, group), samples >= 0
        # A batch that straddles two epochs may hold a sample twice: the later row stays, alike on every rank.
        order = samples.argsort(stable=True)
        order = order[written[order]]
        last = torch.ones_like(order, dtype=torch.bool)
        last[:-1] = samples[order][1:] != samples[order][:-1]
        self.log_u[samples[order[last]]] = log_u_n2[order[last]].to(self.log_u)

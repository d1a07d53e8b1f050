"""Losses over all pairs of the global batch, one tile of the B x B logits at a time.

A loss over pairs is known to this file by what it does with one tile of logits, its `Kernel`: take statistics in a
first sweep (sums of exponentials, maxima), then turn logits into the loss's slope by them in a second one. The slope
goes into two matrix products and is gone. A loss that needs no statistics (a sum of terms of one logit each) takes one
sweep. Between two sweeps the tiles are kept where all of them together are small (`KEEP_ALL_AT_MOST`); else nearly all
are computed again, and nothing of size n x B is stored.

Each rank works on its images against all captions, and only on those: the statistics of a caption's column are summed
over ranks, and so are the gradients. That is half the work and half the traffic of computing both directions on each
rank. The second sweep belongs to the forward call, so that backward only multiplies; memory is that of the features and
their gradients.

Legend: n rows of this rank, B rows in all, D feature width; r x c a tile, r of the n rows and c of the B columns.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from contrastive.errors import UserError
from contrastive.losses.exchange import Block, open_exchange
from contrastive.losses.gather import GlobalBatch, same_ids

# Sides that were fastest here: a float32 tile of 4 MB stays in a CPU's cache. (512 to 2048 are within 3 %.)
AUTO_TILE = {"cpu": 1024}
AUTO_TILE_ELSEWHERE = 4096
# Bytes of tiles that are kept between two sweeps under tile="auto", since to compute all of them again adds a third to
# the time: all, if they take no more than the first (8,192 pairs on one process in float32); else the second's worth.
KEEP_ALL_AT_MOST = 256 << 20
KEEP_SOME = 112 << 20


@dataclass(frozen=True)
class Tile:
    """Where a tile lies: `rows` among this rank's rows, `columns` among those of the global batch."""

    rows: slice
    columns: slice
    first_own: int  # the column of this rank's row 0

    def within(self, block: Block) -> slice:
        """The tile's columns among the rows of `block`."""
        return slice(self.columns.start - block.first, self.columns.stop - block.first)

    def own(self, x_rc: Tensor) -> tuple[Tensor, slice]:
        """The tile's entries of pairs with themselves, as a view, and the local rows that they belong to."""
        offset = self.first_own + self.rows.start - self.columns.start
        if offset >= x_rc.shape[1] or -offset >= x_rc.shape[0]:
            return x_rc.new_empty(0), slice(0, 0)
        view = x_rc.diagonal(offset)
        first = self.rows.start + max(0, -offset)
        return view, slice(first, first + len(view))


class Kernel:
    """What one loss does with a tile of logits. All arithmetic of a subclass is in place on the tile.

    Args:
        leave_out_same: rows that are the same thing (`same_ids`) are nothing to one another.
        positives: rows that are the same thing are right for one another.
    """

    sweeps = 2

    def __init__(self, batch: GlobalBatch, *, leave_out_same: bool = False, positives: bool = False) -> None:
        self.batch, self.leave_out_same, self.positives = batch, leave_out_same, positives
        n = batch.image_nD.shape[0]
        self.own_n = batch.scale.new_full((n,), -torch.inf)  # the logit of each image with what is right for it
        self.best_n = batch.scale.new_full((n,), -torch.inf)  # the largest other logit of each image
        self.bias_slope = batch.scale.new_zeros(())

    # ---- what a subclass does

    def observe(self, x_rc: Tensor, fixed_rc: Tensor | None, tile: Tile) -> None:
        """First sweep: take the statistics of a tile of logits. It may leave there what `slope` then starts from."""

    def settle(self) -> bool:
        """Between the sweeps: complete the statistics over ranks. False if they left the range of the number format."""
        return True

    def slope(self, x_rc: Tensor, fixed_rc: Tensor | None, tile: Tile, fresh: bool) -> None:
        """Second sweep: put W times d loss / d logit in place of the logits (W: DDP takes the mean over ranks).

        fresh: the tile holds logits; otherwise what `observe` left of them.
        """
        raise NotImplementedError

    def finish(self) -> None:
        """Behind the second sweep: complete over ranks what it added up."""

    def loss(self) -> Tensor:
        """The share of this rank in the loss, such that the mean over ranks is the loss."""
        raise NotImplementedError

    def own_slope(self) -> Tensor | None:
        """`(n,)`: a slope of each pair with itself that is known only after the second sweep, on top of `slope`."""
        return None

    def scale_slope(self) -> Tensor | float:
        """W times the derivative by the scale beside that through the logits."""
        return 0.0

    # ---- what subclasses share

    def same(self, tile: Tile) -> Tensor:
        """`(r, c)` bool: another row that is the same thing, see `same_ids`."""
        assert self.batch.ids_n is not None and self.batch.ids_B is not None
        same_rc = same_ids(self.batch.ids_n[tile.rows], self.batch.ids_B[tile.columns])
        own, _ = tile.own(same_rc)
        own.fill_(False)
        return same_rc

    def left_out(self, tile: Tile) -> Tensor | None:
        """`(r, c)` bool: pairs that do not exist, since a row is not valid or both are the same thing."""
        mask_rc = self.same(tile) if self.leave_out_same else None
        if self.batch.valid_n is not None and self.batch.valid_B is not None:
            invalid_rc = ~(self.batch.valid_n[tile.rows, None] & self.batch.valid_B[None, tile.columns])
            mask_rc = invalid_rc if mask_rc is None else mask_rc | invalid_rc
        return mask_rc

    def mask(self, x_rc: Tensor, tile: Tile) -> None:
        """Put minus infinity where a pair does not exist: it has no share in any sum, maximum or hinge."""
        left_out_rc = self.left_out(tile)
        if left_out_rc is not None:
            x_rc.masked_fill_(left_out_rc, -torch.inf)

    def note_own_and_best(self, x_rc: Tensor, tile: Tile) -> None:
        """Keep each image's own logit, and its largest other one. Any increasing function of the logits will do."""
        own, rows = tile.own(x_rc)
        right_n, others_rc = self.own_n[tile.rows], x_rc
        self.own_n[rows] = torch.maximum(self.own_n[rows], own)
        if self.positives:
            same_rc = self.same(tile)
            torch.maximum(right_n, x_rc.masked_fill(~same_rc, -torch.inf).amax(dim=1), out=right_n)
            others_rc = x_rc.masked_fill(same_rc, -torch.inf)
        others_own, _ = tile.own(others_rc)
        saved = others_own.clone()
        others_own.fill_(-torch.inf)
        best_n = self.best_n[tile.rows]
        torch.maximum(best_n, others_rc.amax(dim=1), out=best_n)
        others_own.copy_(saved)

    def accuracy(self) -> Tensor:
        """The share of images that are more similar to their caption than to any other."""
        return self.batch.mean_over_anchors((self.own_n > self.best_n).to(self.own_n.dtype))


LOG2_E = math.log2(math.e)


def exp_(x: Tensor) -> Tensor:
    """e^x in place, as 2^(x log2 e): torch's exp2 takes a third of the time of its exp on a CPU.

    The error is that of a product, 6e-8 |x| in float32; logits carry as much from the product that made them.
    """
    return x.mul_(LOG2_E).exp2_()


K = TypeVar("K", bound=Kernel)


@torch.compiler.disable  # a compiled graph calls it as it stands; its tiles are matrix products already
def tiled_loss(
    batch: GlobalBatch,
    make_kernel: Callable[[GlobalBatch], K],
    *,
    tile: int | str,
    exchange: str,
    fixed: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, K]:
    """The loss of `make_kernel`'s kernel with its gradient, and the kernel behind its last sweep.

    fixed: `(n, F)` features of this rank's images and captions, without a gradient; a tile of their products goes to
        the kernel beside each tile of logits.

    Raises UserError where the logits span more than even float64 can hold as exponentials.
    """
    leaves = (
        batch.image_nD,
        batch.text_nD,
        batch.scale,
        batch.scale.new_zeros(()) if batch.bias is None else batch.bias,
    )
    wants_gradient = torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves)
    dtype = batch.scale.dtype
    with torch.no_grad():
        kernel = make_kernel(batch)
        found = _sweep(batch, kernel, tile, exchange, fixed, wants_gradient)
        if found is None and dtype == torch.float32:
            kernel = make_kernel(batch.in_double())
            found = _sweep(kernel.batch, kernel, tile, exchange, fixed, wants_gradient)
    if found is None:
        raise UserError(
            "the logits span more than exp can hold: see that the features are L2-normalised and the scale at most 100"
        )
    loss, gradients = found
    return _Swept.apply(loss.to(dtype), [gradient.to(dtype) for gradient in gradients], *leaves), kernel


class _Swept(torch.autograd.Function):
    """Ties a loss and its gradients to what they are the gradients of."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor], *leaves: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return loss.clone()  # an input that is returned would be taken for a view of itself

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # only create_graph=True asks for that
            raise UserError("a tiled loss has no second derivative; pass tile=None for the plain loss, which has one")
        if upstream.device.type == "cpu" and float(upstream) == 1:  # as from loss.backward(): spare the large copies
            # scale and bias are copied: as leaves they would take what is saved here for their own .grad
            return None, None, *(saved if saved.ndim else saved.clone() for saved in ctx.saved_tensors)
        return None, None, *(upstream * gradient for gradient in ctx.saved_tensors)


def _sweep(
    batch: GlobalBatch,
    kernel: Kernel,
    tile: int | str,
    exchange: str,
    fixed: tuple[Tensor, Tensor] | None,
    wants_gradient: bool,
) -> tuple[Tensor, list[Tensor]] | None:
    """The loss and the gradients of image, text, scale and bias; None if the statistics left the number format."""
    image_nD, first_own = batch.image_nD, batch.rows.start
    side = int(tile) if tile != "auto" else AUTO_TILE.get(image_nD.device.type, AUTO_TILE_ELSEWHERE)
    fixed_image_nF, fixed_text_nF = (x.to(image_nD.dtype) for x in fixed) if fixed is not None else (None, None)
    blocks = open_exchange(batch, fixed_text_nF, exchange)
    size = len(image_nD) * batch.size * image_nD.element_size() * (1 if fixed is None else 2)
    room = 0  # bytes of tiles that may still be kept
    if kernel.sweeps == 2 and wants_gradient and tile == "auto":
        room = size if size <= KEEP_ALL_AT_MOST else KEEP_SOME
    similarity = _Products(image_nD, batch.scale)
    fixed_similarity = None if fixed_image_nF is None else _Products(fixed_image_nF, None)

    def logits(at: Tile, block: Block, keep: bool) -> tuple[Tensor, Tensor | None]:
        within = at.within(block)
        x_rc = similarity(at.rows, block.text_mD[within], keep)
        if fixed_similarity is None or block.fixed_mF is None:
            return x_rc, None
        return x_rc, fixed_similarity(at.rows, block.fixed_mF[within], keep)

    kept: deque[tuple[Tensor, Tensor | None]] = deque()  # the first tiles; the sweeps go over them in the same order
    if kernel.sweeps == 2:
        for block in blocks.read():
            for at in _tiles(len(image_nD), block, side, first_own):
                x_rc, fixed_rc = logits(at, block, keep=room > 0)
                kernel.observe(x_rc, fixed_rc, at)
                if room > 0:
                    kept.append((x_rc, fixed_rc))
                    room -= x_rc.nbytes * (1 if fixed_rc is None else 2)
        if not kernel.settle():
            return None
        if not wants_gradient:
            return kernel.loss(), []

    product_nD = torch.zeros_like(image_nD) if wants_gradient else None  # slope @ text
    for block in blocks.write() if wants_gradient else blocks.read():
        for at in _tiles(len(image_nD), block, side, first_own):
            fresh = not kept
            x_rc, fixed_rc = logits(at, block, keep=False) if fresh else kept.popleft()
            kernel.slope(x_rc, fixed_rc, at, fresh)
            if product_nD is not None and block.grad_mD is not None:
                within = at.within(block)
                product_nD[at.rows].addmm_(x_rc, block.text_mD[within])
                block.grad_mD[within].addmm_(x_rc.T, similarity.scaled(at.rows))
    kernel.finish()
    if product_nD is None:
        return kernel.loss(), []

    grad_text_nD = blocks.gradient()
    own_n = kernel.own_slope()
    if own_n is not None:
        product_nD.addcmul_(own_n[:, None], batch.text_nD)
        grad_text_nD.addcmul_((own_n * batch.scale)[:, None], image_nD)
    # d loss / d scale is the sum over pairs of slope times similarity: the product holds it already
    parts = [(product_nD[at] * image_nD[at]).sum() for at in _rows(len(image_nD), side)]
    grad_scale = torch.stack(parts).sum() + kernel.scale_slope()
    return kernel.loss(), [product_nD.mul_(batch.scale), grad_text_nD, grad_scale, kernel.bias_slope]


def _rows(n: int, side: int) -> Iterator[slice]:
    for start in range(0, n, side):
        yield slice(start, min(start + side, n))


def _tiles(n: int, block: Block, side: int, first_own: int) -> Iterator[Tile]:
    """Row by row, so that what is prepared for some rows serves all their tiles."""
    for rows in _rows(n, side):
        for columns in _rows(len(block.text_mD), side):
            yield Tile(rows, slice(block.first + columns.start, block.first + columns.stop), first_own)


class _Products:
    """Tiles of `scale * a @ b.T`; unless they are kept, all in one tile's memory: fresh memory costs time."""

    def __init__(self, a_nD: Tensor, scale: Tensor | None) -> None:
        self.a_nD, self.scale = a_nD, scale
        self.memory = a_nD.new_empty(0)
        self.rows, self.scaled_rD = slice(0, 0), a_nD[:0]

    def scaled(self, rows: slice) -> Tensor:
        """`scale * a` for some rows; kept for the next call."""
        if rows != self.rows:
            self.rows, self.scaled_rD = rows, self.a_nD[rows]
            if self.scale is not None:
                self.scaled_rD = self.scaled_rD * self.scale
        return self.scaled_rD

    def __call__(self, rows: slice, b_cD: Tensor, keep: bool) -> Tensor:
        """The tile, `(r, c)`; valid until the next call, unless it is to be kept."""
        a_rD = self.scaled(rows)
        if keep:
            return torch.mm(a_rD, b_cD.T)
        size = len(a_rD) * len(b_cD)
        if self.memory.numel() < size:
            self.memory = a_rD.new_empty(size)
        return torch.mm(a_rD, b_cD.T, out=self.memory[:size].view(len(a_rD), len(b_cD)))

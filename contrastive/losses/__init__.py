"""Contrastive losses over normalised features: pure functions, and modules that only bind their options.

Every loss keeps one contract:

    loss(image, text, scale, bias=None, ids=None, group=None, valid=None, **options) -> dict

image, text
    `(n, dim)` floating point, L2-normalised: the rows of this rank, `n` alike on all ranks.
scale, bias
    0-d tensors: the logits are `scale * similarity + bias`. A loss that does not depend on one of them still
    keeps it in the graph, with a gradient of exactly zero, so that DDP finds every parameter used.
ids
    `(n,)` int64, equal where two captions (or images) are the same thing; or `(n, 2)`, the id of each row's caption
    and that of its image. Of these, two rows are the same if they have an equal caption or an equal image.
group
    The process group whose ranks make up the global batch; None is the default group, or one process.
valid
    `(n,)` bool; a row that is not valid is no anchor, no positive and no negative, on any rank.

The result is a dict: `"loss"`, a 0-d tensor with a graph, and detached 0-d tensors to log. Each is such that
its *mean over the ranks* is the value on the whole global batch, and averaging parameter gradients
over ranks, as DDP does, gives the gradient of the plain global loss, for towers, scale and bias alike.
The arithmetic is done in float32, under autocast too, or in float64 if the features are float64.

Most losses share three options:

tile
    "auto" goes over the B x B logits in tiles and stores all of them only where that takes at most 256 MiB; beyond
    it computes all but 112 MiB of them again. A number is the side of a tile, of which one is held. None is the plain
    formula on `(n, B)` matrices with torch's own gradient, which the tiled way equals to rounding, and which has
    second derivatives on one process.
exchange
    How ranks see each other's captions when tiled: "gather" all at once, or "ring", one block at a time; "auto"
    gathers up to 1 GiB.
check
    Whether to look at norms and scale: True, False, or None for "on a CPU".

`docs/losses.md` tables them all: when to use which, memory, bytes between processes, sources.
"""

from contrastive.losses.combined import CustomLoss, WeightedSum, needs_of
from contrastive.losses.contract import Loss
from contrastive.losses.cyclip import CyCLIP, cyclip
from contrastive.losses.dcl import DCL, dcl
from contrastive.losses.distillation import Distillation, distillation
from contrastive.losses.fused import fuse
from contrastive.losses.gather import GlobalBatch, global_batch
from contrastive.losses.infonce import InfoNCE, infonce
from contrastive.losses.margin import Margin, margin
from contrastive.losses.siglip import SigLIP, siglip
from contrastive.losses.sogclr import SogCLR, sogclr
from contrastive.losses.tiled import Kernel, Tile, tiled_loss

__all__ = [
    "DCL",
    "CustomLoss",
    "CyCLIP",
    "Distillation",
    "GlobalBatch",
    "InfoNCE",
    "Kernel",
    "Loss",
    "Margin",
    "SigLIP",
    "SogCLR",
    "Tile",
    "WeightedSum",
    "cyclip",
    "dcl",
    "distillation",
    "fuse",
    "global_batch",
    "infonce",
    "margin",
    "needs_of",
    "siglip",
    "sogclr",
    "tiled_loss",
]

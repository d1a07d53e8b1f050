"""The global batch as one rank sees it: its own features, everybody's ids, and the features of all on demand.

Legend: n rows of this rank, W ranks, B = W * n rows in all, D feature width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from contrastive.errors import UserError
from contrastive.losses.contract import check_arguments, check_batch_size, check_ids, looks_at_values
from contrastive.losses.waiting import exchanging

# torch renamed them, and warns of the old names
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _GatherRows(torch.autograd.Function):
    """All ranks' rows, in order of rank; backward *sums* over ranks what each of them owes to a row."""

    @staticmethod
    def forward(ctx: Any, rows_nD: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return all_gather(rows_nD, group)

    @staticmethod
    def backward(ctx: Any, grad_BD: Tensor) -> tuple[Tensor, None]:
        refuse_second_derivative()
        return reduce_scatter(grad_BD, ctx.group), None


def refuse_second_derivative() -> None:
    """Raise UserError in the backward of a function that exchanges with other ranks, if it is to be differentiated."""
    if torch.is_grad_enabled():  # only create_graph=True asks for that
        raise UserError(
            "a loss over several processes has no second derivative; compute it on one process, with tile=None"
        )


def all_gather(rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The rows of all ranks, in order of rank, without a gradient."""
    everybody = rows.new_empty(dist.get_world_size(group) * rows.shape[0], *rows.shape[1:])
    with exchanging():
        _all_gather(everybody, rows.contiguous(), group=group)
    return everybody


def reduce_scatter(rows_BD: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """This rank's n rows of the sum over ranks of `rows_BD`."""
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    n = rows_BD.shape[0] // world
    if dist.get_backend(group) == "nccl":
        own_nD = rows_BD.new_empty(n, *rows_BD.shape[1:])
        with exchanging():
            _reduce_scatter(own_nD, rows_BD.contiguous(), group=group)
        return own_nD
    # gloo has no reduce-scatter on the older versions of torch that we support
    rows_BD = rows_BD.clone(memory_format=torch.contiguous_format)
    with exchanging():
        dist.all_reduce(rows_BD, group=group)
    return rows_BD[rank * n : (rank + 1) * n].clone()  # a view would keep all rows


def same_ids(ids_r: Tensor, ids_c: Tensor) -> Tensor:
    """`(r, c)` bool: the row and the column are the same thing.

    ids_r, ids_c: int64 `(r,)` and `(c,)`, equal where two are the same; or `(r, 2)` and `(c, 2)`, the ids of captions
        and of images, where two are the same if the caption is equal or the image is. That is no equivalence: of three
        pairs the first two may share a caption and the last two an image.
    """
    if ids_r.ndim == 1:
        return ids_r[:, None] == ids_c[None, :]
    same_rc = ids_r[:, None, 0] == ids_c[None, :, 0]
    return same_rc.logical_or_(ids_r[:, None, 1] == ids_c[None, :, 1])


def _count_same(ids_B: Tensor, counted_B: Tensor) -> Tensor:
    """`(B,)` int64: how many counted rows are the same thing as each, itself among them. counted_B: int64, 0 or 1."""

    def equal(ids_B: Tensor) -> tuple[Tensor, Tensor]:
        _, which_B = ids_B.unique(return_inverse=True)
        return which_B, torch.zeros_like(which_B).index_add_(0, which_B, counted_B)[which_B]

    if ids_B.ndim == 1:
        return equal(ids_B)[1]
    (caption_B, captions_B), (image_B, images_B) = equal(ids_B[:, 0]), equal(ids_B[:, 1])
    # rows with the caption plus rows with the image; rows with both were counted twice
    return captions_B + images_B - equal(caption_B * len(ids_B) + image_B)[1]


@dataclass(frozen=True)
class GlobalBatch:
    """What a loss needs to know of the global batch. On one process the `_B` tensors are the local ones."""

    image_nD: Tensor
    text_nD: Tensor
    scale: Tensor  # in the precision of the features
    bias: Tensor | None
    ids_n: Tensor | None  # (n,) or (n, 2), see `same_ids`
    ids_B: Tensor | None
    valid_n: Tensor | None  # None: every row of every rank is valid
    valid_B: Tensor | None
    group: dist.ProcessGroup | None
    world: int
    rank: int

    @property
    def size(self) -> int:
        """B, rows that are not valid included."""
        return self.world * self.image_nD.shape[0]

    @property
    def rows(self) -> slice:
        """Where this rank's rows lie in the global batch."""
        n = self.image_nD.shape[0]
        return slice(self.rank * n, (self.rank + 1) * n)

    @property
    def own(self) -> Tensor:
        """`(n,)` int64: for each local row its column in an `(n, B)` block, the place of its own partner."""
        return torch.arange(self.rows.start, self.rows.stop, device=self.image_nD.device)

    def features_of_all(self) -> tuple[Tensor, Tensor]:
        """`image_BD` and `text_BD` with a gradient, in one collective."""
        if self.world == 1:
            return self.image_nD, self.text_nD
        both = _GatherRows.apply(torch.cat([self.image_nD, self.text_nD], dim=1), self.group)
        image_BD, text_BD = both.split(self.image_nD.shape[1], dim=1)
        return image_BD, text_BD

    def similarities(self) -> tuple[Tensor, Tensor]:
        """`(n, B)` similarities of this rank's images to all captions, and of its captions to all images."""
        image_BD, text_BD = self.features_of_all()
        similarity_image_nB = self.image_nD @ text_BD.T
        return similarity_image_nB, similarity_image_nB.T if self.world == 1 else self.text_nD @ image_BD.T

    def same_id(self) -> Tensor:
        """`(n, B)` bool: another row that is the same thing, see `same_ids`. The row itself is not counted."""
        assert self.ids_n is not None and self.ids_B is not None
        return same_ids(self.ids_n, self.ids_B).scatter_(1, self.own[:, None], False)

    def negatives(self, *, leave_out_same: bool) -> Tensor:
        """`(B,)` int64: how many valid rows are another thing than this one; 0 for a row that is not valid."""
        valid = self.valid_B
        if valid is None:
            valid = torch.ones(self.size, dtype=torch.bool, device=self.image_nD.device)
        alike = valid.to(torch.int64)
        if leave_out_same:
            assert self.ids_B is not None
            alike = _count_same(self.ids_B, alike)
        return (valid.sum() - alike) * valid

    @property
    def anchors(self) -> Tensor | int:
        """The number of valid rows of the global batch, at least 1."""
        return self.size if self.valid_B is None else self.valid_B.sum().clamp(min=1).to(self.scale.dtype)

    def mean_over_anchors(self, per_anchor_n: Tensor) -> Tensor:
        """The share of this rank in a mean over the valid rows of the global batch.

        It is multiplied by W, so that the *mean* over ranks of what is returned is that mean. With the
        summing backward of the gather, DDP's mean over ranks of the parameter gradients is then exact.
        """
        if self.valid_n is None:
            return per_anchor_n.mean()
        # a sum of zero terms over a count of at least one: a batch without any valid row has loss 0
        return per_anchor_n.masked_fill(~self.valid_n, 0).sum() * self.world / self.anchors

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        """The sum over ranks of a tensor that needs no gradient, in place."""
        if self.world > 1:
            with exchanging():
                dist.all_reduce(value, group=self.group)
        return value

    def keep_in_graph(self, loss: Tensor) -> Tensor:
        """`loss` with a zero gradient for scale and bias where it does not depend on them, for DDP."""
        loss = loss + 0 * self.scale
        return loss if self.bias is None else loss + 0 * self.bias

    def with_scale(self, scale: Tensor) -> "GlobalBatch":
        """The same batch with another scale, for a loss that does not learn it or does not have one."""
        return replace(self, scale=scale)

    def in_double(self) -> "GlobalBatch":
        """The same batch with float64 features, scale and bias."""
        return replace(
            self,
            image_nD=self.image_nD.double(),
            text_nD=self.text_nD.double(),
            scale=self.scale.double(),
            bias=None if self.bias is None else self.bias.double(),
        )


def global_batch(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    ids: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    valid: Tensor | None = None,
    check: bool | None = None,
    same_caption: str = "negative",
    *,
    also: Callable[[], None] | None = None,
) -> GlobalBatch:
    """Check the arguments of a loss and gather ids and valid flags of all ranks; call it with autocast disabled.

    same_caption: what the loss makes of equal captions; all but "negative" need `ids`.
    also: further checks of what this rank was given, which raise UserError.

    Raises UserError for shapes, types and values that no loss can take. What one rank refuses, all refuse, rather than
    wait for it in a collective until the time-out: they compare notes on a CPU, and elsewhere with `check=True`, since
    that makes the host wait for the device.
    """
    world = _world(group)
    refusal = None
    try:
        check_arguments(image, text, scale, bias, ids, valid, check)
        check_batch_size(world * image.shape[0])
        check_ids(same_caption, ids)
        if also is not None:
            also()
    except UserError as error:
        refusal = error
    if world > 1 and _compares_notes(check, image):
        _agree(refusal, image, text, scale, ids, valid, group)
    if refusal is not None:
        raise refusal

    dtype = torch.promote_types(torch.promote_types(image.dtype, text.dtype), torch.float32)
    image, text, scale = image.to(dtype), text.to(dtype), scale.to(dtype).reshape(())
    bias = None if bias is None else bias.to(dtype).reshape(())
    rank, ids_all, valid_all = 0, ids, valid
    if world > 1:
        rank = dist.get_rank(group)
        extra = [x.to(torch.int64).reshape(len(image), -1) for x in (ids, valid) if x is not None]
        if extra:
            columns = all_gather(torch.cat(extra, dim=1), group)
            if ids is not None:
                ids_all = columns[:, 0] if ids.ndim == 1 else columns[:, : ids.shape[1]]
            if valid is not None:
                valid_all = columns[:, -1].bool()
    if valid_all is not None and valid_all.device.type == "cpu" and bool(valid_all.all()):
        valid = valid_all = None  # nothing to leave out: the shorter way
    if valid is not None:  # whatever stands there, NaN too, must not reach a product
        image, text = (features.masked_fill(~valid[:, None], 0) for features in (image, text))
    return GlobalBatch(image, text, scale, bias, ids, ids_all, valid, valid_all, group, world, rank)


@contextmanager
def refusing_alike(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    ids: Tensor | None,
    valid: Tensor | None,
    group: dist.ProcessGroup | None,
    check: bool | None = None,
) -> Iterator[None]:
    """For checks ahead of the call of a loss: what this rank refuses in here, the others refuse in that call."""
    try:
        yield
    except UserError as refusal:
        if _world(group) > 1 and _compares_notes(check, image):
            _agree(refusal, image, text, scale, ids, valid, group)
        raise


def _world(group: dist.ProcessGroup | None) -> int:
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def _compares_notes(check: bool | None, image: Tensor) -> bool:
    return image.device.type == "cpu" or looks_at_values(check, image.device)


def _agree(
    refusal: UserError | None,
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    ids: Tensor | None,
    valid: Tensor | None,
    group: dist.ProcessGroup | None,
) -> None:
    """Raise UserError on every rank alike where one refuses its arguments, or where they do not fit together."""
    rows, width = image.shape if image.ndim == 2 else (0, 0)
    double = torch.float64 in (image.dtype, getattr(text, "dtype", None))
    size = float(scale.detach()) if isinstance(scale, Tensor) and scale.numel() == 1 else 0.0
    id_columns = 0 if ids is None else getattr(ids, "ndim", 1)
    own = [rows, width, double, id_columns, valid is not None, refusal is not None, size]
    notes = all_gather(torch.tensor([own], dtype=torch.float64, device=image.device), group)
    sizes, widths, doubles, with_ids, with_valid, refused = notes[:, :-1].long().T.tolist()
    scales = notes[:, -1].tolist()
    if any(refused):
        if refusal is not None:
            raise refusal
        ranks = [rank for rank, said_no in enumerate(refused) if said_no]
        raise UserError(
            f"ranks {ranks} of {len(notes)} refused their part of the batch; see the error of rank {ranks[0]}"
        )
    if len(set(sizes)) > 1:
        raise UserError(f"local batches of {sizes} rows: pad them to one size and use `valid`")
    if len(set(widths)) > 1 or len(set(doubles)) > 1:
        kinds = [f"{width} x {'float64' if d else 'float32'}" for width, d in zip(widths, doubles, strict=True)]
        raise UserError(f"features of {', '.join(kinds)} on the ranks: they must be of one width and precision")
    if len(set(scales)) > 1:
        raise UserError(f"scales of {scales} on the ranks: the logit scale must be the same on all")
    for name, given in (("ids", with_ids), ("valid", with_valid)):
        if name == "ids" and set(given) == {1, 2}:
            raise UserError(
                f"`ids` of {given} columns on the ranks: give (n,), or captions and images (n, 2), on all of them"
            )
        if len(set(given)) > 1:
            ranks = [rank for rank, has in enumerate(given) if has]
            raise UserError(
                f"`{name}` is given on ranks {ranks} of {len(given)} alone: give it on all of them or on none"
            )

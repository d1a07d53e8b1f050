"""Distillation: the student's similarities should be distributed as those of a teacher.

Legend: n rows of this rank, B rows in all, T feature width of the teacher; r x c a tile.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from contrastive.errors import UserError
from contrastive.losses.contract import (
    Loss,
    check_norms,
    check_number,
    check_samples,
    check_tiling,
    device_type,
    looks_at_values,
)
from contrastive.losses.gather import GlobalBatch, global_batch, refusing_alike
from contrastive.losses.softmax import Exponentials, SoftmaxKernel
from contrastive.losses.tiled import Tile, tiled_loss


def distillation(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    ids: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    valid: Tensor | None = None,
    *,
    teacher_image: Tensor,
    teacher_text: Tensor,
    teacher_scale: float = 100.0,
    tile: int | str | None = "auto",
    exchange: str = "auto",
    check: bool | None = None,
) -> dict[str, Tensor]:
    """Mean over pairs and both directions of  -sum_j softmax_j(teacher's logits) log softmax_j(student's logits).

    Arguments as in `contrastive.losses`; equals the second result of `open_clip.loss.DistillClipLoss`. Its gradient is
    zero where the student's logits are the teacher's up to a constant a row and column. Use it beside InfoNCE.

    teacher_image, teacher_text: `(n, T)` L2-normalised features of the same pairs; T need not be the student's width.
    teacher_scale: the teacher's logit scale; a lower one softens its answers.

    Returns "loss" and "accuracy" (the student's).
    Raises UserError for shapes that do not fit, or a teacher's scale that is not above 0.

    Source: Hinton et al. 2015 (arXiv:1503.02531) on the distributions of CLIP; as in Vasu et al. 2023, MobileCLIP
    (arXiv:2311.17049), equation 2, with the cross-entropy in place of the divergence: the gradient is the same.
    """
    check_tiling(tile, exchange)
    check_number("teacher_scale", teacher_scale, 1e-9, 1e9, "choose the teacher's logit scale, above 0; CLIP's is 100")

    def check_teacher() -> None:
        for name, features in (("teacher_image", teacher_image), ("teacher_text", teacher_text)):
            if not isinstance(features, Tensor) or not features.is_floating_point():
                kind = features.dtype if isinstance(features, Tensor) else type(features).__name__
                raise UserError(f"{name} is {kind}: the teacher's features are a floating-point tensor")
            if features.ndim != 2 or len(features) != len(image) or features.shape[1] != teacher_image.shape[1]:
                raise UserError(
                    f"{name} {tuple(features.shape)}: the teacher's features of the same {len(image)} pairs, of one "
                    "width"
                )
            if looks_at_values(check, features.device):
                check_norms(name, features, valid)

    with torch.autocast(device_type(image), enabled=False):
        batch = global_batch(image, text, scale, bias, ids, group, valid, check, also=check_teacher)
        teacher = (teacher_image.detach().to(batch.image_nD), teacher_text.detach().to(batch.image_nD))
        if tile is None:
            return _plain(batch, *teacher, teacher_scale)
        loss, kernel = tiled_loss(
            batch, lambda b: DistillationKernel(b, teacher_scale), tile=tile, exchange=exchange, fixed=teacher
        )
        return {"loss": loss, "accuracy": kernel.accuracy()}


def _plain(batch: GlobalBatch, teacher_image: Tensor, teacher_text: Tensor, teacher_scale: float) -> dict[str, Tensor]:
    """The formula on `(n, B)` logits, with torch's own gradient."""
    teacher = replace(batch, image_nD=teacher_image, text_nD=teacher_text)
    left_out = None if batch.valid_B is None else ~batch.valid_B[None, :]
    per_anchor_n, right_n = torch.zeros_like(batch.own, dtype=batch.scale.dtype), None
    for similarity_nB, target_nB in zip(batch.similarities(), teacher.similarities(), strict=True):
        logits_nB, target_nB = batch.scale * similarity_nB, teacher_scale * target_nB
        if left_out is not None:
            logits_nB, target_nB = (x.masked_fill(left_out, -torch.inf) for x in (logits_nB, target_nB))
        log_student_nB = logits_nB.log_softmax(dim=1)
        if left_out is not None:  # 0 * -inf is NaN: any finite number serves where the target is 0
            log_student_nB = log_student_nB.masked_fill(left_out, 0)
        per_anchor_n = per_anchor_n - (target_nB.softmax(dim=1) * log_student_nB).sum(dim=1) / 2
        if right_n is None:
            others_nB = logits_nB.detach().scatter(1, batch.own[:, None], -torch.inf)
            right_n = logits_nB.detach().gather(1, batch.own[:, None])[:, 0] > others_nB.amax(dim=1)
    assert right_n is not None
    loss = batch.keep_in_graph(batch.mean_over_anchors(per_anchor_n))
    return {"loss": loss, "accuracy": batch.mean_over_anchors(right_n.to(loss.dtype))}


class DistillationKernel(SoftmaxKernel):
    """Log-sum minus the mean logit under the teacher's distribution, which needs sums of its own."""

    def __init__(self, batch: GlobalBatch, teacher_scale: float) -> None:
        super().__init__(batch)
        self.teacher_scale = teacher_scale
        self.teacher = Exponentials(batch, batch.scale.new_tensor(teacher_scale))
        # sums of exp(teacher's logit) * student's logit
        self.cross_n, self.cross_B = torch.zeros_like(self.own_n), batch.scale.new_zeros(batch.size)

    def _teacher_exp(self, fixed_rc: Tensor, tile: Tile) -> None:
        fixed_rc.mul_(self.teacher_scale)
        self.mask(fixed_rc, tile)
        self.teacher.exp(fixed_rc)

    def observe(self, x_rc: Tensor, fixed_rc: Tensor | None, tile: Tile) -> None:
        assert fixed_rc is not None
        self._teacher_exp(fixed_rc, tile)
        self.teacher.add(fixed_rc, tile)
        cross_rc = fixed_rc * x_rc
        self.cross_n[tile.rows] += cross_rc.sum(dim=1)
        self.cross_B[tile.columns] += cross_rc.sum(dim=0)
        super().observe(x_rc, fixed_rc, tile)

    def settle(self) -> bool:
        teacher_in_range = bool(self.teacher.settle(self.batch, self.counted_B))
        self.batch.sum_over_ranks(self.cross_B)
        return super().settle() and teacher_in_range

    def factors(self) -> tuple[Tensor, Tensor]:
        self.teacher_row_n = (self.share / self.teacher.row_sum_n).masked_fill(~self.counted_n, 0)
        self.teacher_column_B = (self.share / self.teacher.column_sum_B).masked_fill(~self.counted_B, 0)
        return super().factors()

    def slope(self, x_rc: Tensor, fixed_rc: Tensor | None, tile: Tile, fresh: bool) -> None:
        assert fixed_rc is not None
        if fresh:
            self._teacher_exp(fixed_rc, tile)
            self.exponentiate(x_rc, tile)
        self.multiply(x_rc, self.row_factor_n[tile.rows], self.column_factor_B[tile.columns])
        self.multiply(fixed_rc, self.teacher_row_n[tile.rows], self.teacher_column_B[tile.columns])
        x_rc.sub_(fixed_rc)

    def loss(self) -> Tensor:
        row_n, column_n = self.sums.log_sums(self.batch)
        target_n = self.cross_n / self.teacher.row_sum_n
        column_target_n = (self.cross_B / self.teacher.column_sum_B)[self.batch.rows]
        return self.batch.mean_over_anchors((row_n - target_n + column_n - column_target_n) / 2)


class Distillation(Loss):
    """`distillation` with the teacher's features of the whole data set at hand.

    Args:
        teacher_image, teacher_text: `(S, T)` L2-normalised features of the S samples, in the order of their numbers;
            they stay where they are (a memory map will do) and are not saved in checkpoints.
        options: those of `distillation`.
    """

    function = staticmethod(distillation)
    needs = ("samples",)

    def __init__(self, teacher_image: Tensor, teacher_text: Tensor, **options: Any) -> None:
        super().__init__(**options)
        if len(teacher_image) != len(teacher_text):
            raise UserError(
                f"teacher_image has {len(teacher_image)} rows and teacher_text {len(teacher_text)}: one for each sample"
            )
        self.teacher_image, self.teacher_text = teacher_image, teacher_text

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
        """Call `distillation` with the teacher's features of these rows.

        samples: `(n,)` int64, the number of each pair in the data set.
        """
        with refusing_alike(image, text, scale, ids, valid, group, self.options.get("check")):
            check_samples("distillation", samples, len(image), len(self.teacher_image))
        assert samples is not None
        where = samples.to(self.teacher_image.device)
        return distillation(
            image, text, scale, bias, ids, group, valid,
            teacher_image=self.teacher_image[where].to(image.device),
            teacher_text=self.teacher_text[where].to(image.device),
            **self.options,
        )  # fmt: skip

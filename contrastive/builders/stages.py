"""The part of `build` that makes stages of a recipe's curriculum; see `contrastive.training.curriculum`."""

from __future__ import annotations

from typing import Any

from contrastive.config import Config, drops_patches
from contrastive.config.spans import SECONDS, period_parts
from contrastive.errors import UserError
from contrastive.models import TwoTower
from contrastive.models.stages import add_patch_dropout, check_contexts, check_sizes
from contrastive.training import Duration, Point
from contrastive.training.curriculum import Curriculum, Settings


def prepare_towers(config: Config, model: TwoTower) -> None:
    """Make a model fit for the stages of the run.

    Raises:
        UserError: a tower cannot do what a stage asks of it.
    """
    stages = config.train.curriculum
    check_sizes(model, sorted({stage.size for stage in stages if stage.size is not None}))
    check_contexts(model, [stage.context for stage in stages if stage.context is not None])
    if drops_patches(config):
        add_patch_dropout(model)


def changes_size(config: Config) -> bool:
    """Whether some stage has images of a size of its own."""
    return any(stage.size is not None for stage in config.train.curriculum)


def build_curriculum(config: Config, model: TwoTower, duration: Duration, epoch: int) -> Curriculum:
    """The stages of a recipe; an epoch is `epoch` pairs.

    Raises:
        UserError: a stage would never begin.
    """
    stages, tail = config.train.curriculum, config.train.unmasked_tail
    if not stages and not drops_patches(config):
        return Curriculum()
    own = Settings(
        model.image_size if stages else None,
        model.tokenizer.context if stages else None,
        config.model.image.patch_dropout if drops_patches(config) else None,
    )
    made: list[tuple[Point, Settings]] = []
    begin = 0.0
    for i, stage in enumerate(stages):
        end = _point(stage.until, config, duration, epoch)
        if duration.steps is not None:
            at = end.steps if end.steps is not None else (end.share or 0.0) * duration.steps
            if not begin < at < duration.steps:
                raise UserError(
                    f"train.curriculum[{i}].until: {stage.until} is step {at:g}; the stage before ends at step "
                    f"{begin:g}, and the run at step {duration.steps}: give the stages in their order, within the run"
                )
            begin = at
        rate = own.patch_dropout if stage.patch_dropout is None or own.patch_dropout is None else stage.patch_dropout
        made.append((end, Settings(stage.size or own.image_size, stage.context or own.context, rate)))
    return Curriculum(made, own, None if tail is None else _from_the_end(tail, config, duration, epoch))


def curriculum_identity(config: Config) -> dict[str, Any] | None:
    """What a checkpoint must have in common with a run that goes on from it; None without stages."""
    stages = [stage.model_dump() for stage in config.train.curriculum]
    if not stages and not drops_patches(config):
        return None
    rate, tail = config.model.image.patch_dropout, config.train.unmasked_tail
    return {"stages": stages, "patch_dropout": rate, "unmasked_tail": tail}


def _point(span: int | str, config: Config, duration: Duration, epoch: int) -> Point:
    """Where a span that begins at the start of the run ends."""
    if isinstance(span, int):
        return Point(steps=span)
    if span.endswith("%"):
        return Point(share=float(span[:-1]) / 100)
    number, unit = period_parts(span)
    if unit in SECONDS:
        assert duration.minutes is not None, "times are refused where the run's length is none"
        return Point(share=number * SECONDS[unit] / (60 * duration.minutes))
    return Point(steps=max(1, round(number * (epoch if unit == "epoch" else 1) / config.train.global_batch)))


def _from_the_end(span: int | str, config: Config, duration: Duration, epoch: int) -> Point:
    point = _point(span, config, duration, epoch)
    if point.share is not None:
        return Point(share=1 - point.share)
    assert duration.steps is not None and point.steps is not None, "refused where the run's length is a time"
    if point.steps >= duration.steps:
        raise UserError(
            f"train.unmasked_tail: {span} are {point.steps} steps, and the run has {duration.steps}; nothing would be "
            "left out"
        )
    return Point(steps=duration.steps - point.steps)

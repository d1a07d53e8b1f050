"""The stages of a run (smaller images, shorter captions, patches left out), and what rules tie them to other keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, PlainValidator

from contrastive.config.block import Block
from contrastive.config.spans import SECONDS, period, period_parts

if TYPE_CHECKING:
    from contrastive.config.recipe import Config


class StageConfig(Block):
    """A stage of the run; what it leaves out is as in the rest of the recipe, which the run ends with."""

    until: Annotated[int | str, PlainValidator(period)] = Field(
        description="its end: a step, 80% of the run, 10 epochs, 50000 samples; 10m of a run in minutes"
    )
    size: int | None = Field(None, ge=1, description="side of the square images, pixels; null: model.image.size")
    context: int | None = Field(None, ge=2, description="tokens that are kept of a caption; null: the tokenizer's")
    patch_dropout: float | None = Field(None, ge=0, lt=1, description="null: model.image.patch_dropout")


def drops_patches(config: Config) -> bool:
    """Whether any part of the run leaves patches out."""
    return bool(config.model.image.patch_dropout or any(stage.patch_dropout for stage in config.train.curriculum))


def curriculum_problems(config: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    """See `impossible_combinations`."""
    yield from _stages(config)
    yield from _tail(config)
    yield from _towers(config)


def _stages(config: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    last: dict[str, float] = {}  # the latest end in each unit: of different ones, only the run knows the order
    for i, stage in enumerate(config.train.curriculum):
        where = f"train.curriculum[{i}]"
        if stage.size is stage.context is stage.patch_dropout is None:
            line = f"{where}: this stage changes nothing; give it a size, a context or a patch_dropout, or leave it out"
            yield (where,), line
        number, unit = _in_units(stage.until)
        if number <= last.get(unit, 0):
            line = f"{where}.until: {stage.until} is not after the stage before; give the stages in their order"
            yield (f"{where}.until",), line
        last[unit] = number
        yield from _length(config, f"{where}.until", stage.until)
        if stage.context is not None and config.model.kind == "pair":
            if stage.context > config.model.tokenizer.context:
                line = f"{where}.context: {stage.context} is above model.tokenizer.context "
                line += f"{config.model.tokenizer.context}, for which the text tower is built; raise that, or lower it"
                yield (f"{where}.context", "model.tokenizer.context"), line


def _length(config: Config, where: str, span: int | str) -> Iterator[tuple[tuple[str, ...], str]]:
    """Ends that do not lie within the run."""
    number, unit = _in_units(span)
    minutes, train = config.train.minutes, config.train
    line = ""
    if unit == "second" and minutes is None:
        line = f"{where}: {span} is a time, and the run's length is none; give a share of the run such as 80%"
    elif unit == "second" and number >= 60 * (minutes or 0):
        line = f"{where}: {span} is not before the end of the run, train.minutes {minutes:g}"
    elif unit == "share" and number >= 1:
        line = f"{where}: {span} is the whole run; choose a share below 100%"
    elif unit == "step" and train.steps is not None and number >= train.steps:
        line = f"{where}: step {span} is not before the end of the run, train.steps {train.steps}"
    if line:
        yield (where, "train"), line


def _tail(config: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    tail = config.train.unmasked_tail
    if tail is None:
        return
    if not drops_patches(config):
        line = f"train.unmasked_tail: {tail} without patches that are left out before; set model.image.patch_dropout, "
        line += "or unmasked_tail to null"
        yield ("train.unmasked_tail", "model.image.patch_dropout", "train.curriculum"), line
    if config.train.minutes is not None and _in_units(tail)[1] not in ("share", "second"):
        line = f"train.unmasked_tail: where the last {tail} of a run of train.minutes begin is known at its end only; "
        line += "give a share of the run such as 5%, or a time"
        yield ("train.unmasked_tail", "train.minutes"), line
    else:
        yield from _length(config, "train.unmasked_tail", tail)


def _towers(config: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    image, dropped = config.model.image, drops_patches(config)
    keys = ("model.image.patch_dropout", "train.curriculum")
    if dropped and image.locked:
        line = "model.image.patch_dropout: a locked image tower runs as in use, with all patches; set it to 0 in model "
        line += "and stages, or model.image.locked to false"
        yield (*keys, "model.image.locked"), line
    if dropped and "patch_drop_rate" in getattr(image, "kwargs", {}):
        line = "model.image.kwargs.patch_drop_rate: model.image.patch_dropout and the stages set it; leave it out"
        yield (*keys, "model.image.kwargs"), line
    if config.data.cache == "features" and (dropped or config.train.curriculum):
        line = "data.cache: features are those of whole images and captions at the recipe's own size; use pixels or "
        line += "none, or leave train.curriculum and model.image.patch_dropout out"
        yield (*keys, "data.cache"), line


def _in_units(span: int | str) -> tuple[float, str]:
    """Number and unit, one of step, share (0 to 1), second, epoch, sample."""
    if isinstance(span, int):
        return span, "step"
    if span.endswith("%"):
        return float(span[:-1]) / 100, "share"
    number, unit = period_parts(span)
    return (number * SECONDS[unit], "second") if unit in SECONDS else (number, unit)

"""Keys that are right alone and wrong together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from contrastive.config.curriculum import curriculum_problems
from contrastive.config.losses import terms_of
from contrastive.config.without_effect import keys_without_effect

if TYPE_CHECKING:
    from contrastive.config.recipe import Config

LENGTHS = ("steps", "samples", "epochs", "minutes")

# The keys that a rule reads, and its line. A rule is left out when one of its keys already has a problem.
Problem = tuple[tuple[str, ...], str]


def impossible_combinations(config: Config) -> Iterator[Problem]:
    """All of them, so that the user mends the recipe once."""
    yield from _length(config)
    if config.model.kind == "pair":
        yield from _towers(config)
    yield from _tuning(config)
    yield from _scale(config)
    yield from _losses(config)
    yield from _augmentation(config)
    yield from _cached_features(config)
    yield from _evaluation(config)
    yield from _sharding(config)
    yield from _compiling(config)
    yield from curriculum_problems(config)
    yield from keys_without_effect(config)


def _length(config: Config) -> Iterator[Problem]:
    train = config.train
    given = {name: getattr(train, name) for name in LENGTHS if getattr(train, name) is not None}
    if len(given) != 1:
        values = ", ".join(f"{name} {value:g}" for name, value in given.items()) or "none"
        line = f"train: give exactly one of {', '.join(LENGTHS)} (given: {values})"
        yield tuple(f"train.{name}" for name in LENGTHS), line
    warmup = config.optim.warmup
    if train.steps is not None and isinstance(warmup, int) and warmup > train.steps:
        line = f"optim.warmup: {warmup} steps of warm-up do not fit into train.steps {train.steps}"
        yield ("optim.warmup", "train.steps"), line


def _towers(config: Config) -> Iterator[Problem]:
    assert config.model.kind == "pair"
    image = config.model.image
    if image.fill_color and image.resize_mode != "longest":
        line = f"model.image.fill_color: {image.fill_color} does nothing with resize_mode {image.resize_mode}; "
        line += "set resize_mode to longest, or fill_color to 0"
        yield ("model.image.fill_color", "model.image.resize_mode"), line
    text, tokenizer = config.model.text, config.model.tokenizer
    if text.kind == "transformer":
        if text.pool == "end" and not text.causal:
            line = "model.text.pool: 'end' needs model.text.causal true; use it, or pool 'mean'"
            yield ("model.text.pool", "model.text.causal"), line
        if text.depth and text.width % text.heads:
            nearest = [n for n in range(1, text.width + 1) if text.width % n == 0]
            heads = min(nearest, key=lambda n: abs(n - text.heads))
            line = f"model.text.heads: {text.heads} does not divide model.text.width {text.width}; use {heads}"
            yield ("model.text.heads", "model.text.width", "model.text.depth"), line
    elif tokenizer.kind != "huggingface":
        line = f"model.tokenizer.kind: '{tokenizer.kind}' does not fit a huggingface text tower; "
        line += "use 'huggingface' and the same path"
        yield ("model.tokenizer.kind", "model.text.kind"), line


def _tuning(config: Config) -> Iterator[Problem]:
    """What else is said of a tower that is locked."""
    for name in ("image", "text"):
        tower, where = getattr(config.model, name), f"model.{name}"
        if tower.unfreeze_at is not None and config.optim.ema is not None:
            line = f"optim.ema: averages what learns from the start, and {where}.unfreeze_at lets a tower learn later; "
            yield ("optim.ema", f"{where}.unfreeze_at"), line + "leave one of them out"
        if not tower.locked:
            continue
        if tower.lora is not None:
            line = f"{where}.lora: the adapters lock the tower themselves; leave {where}.locked out"
            yield (f"{where}.lora", f"{where}.locked"), line
        if tower.unfreeze_at is not None:
            line = f"{where}.unfreeze_at: {tower.unfreeze_at} does not come for a tower that is locked for good; "
            yield (f"{where}.unfreeze_at", f"{where}.locked"), line + f"set {where}.locked to false"
        if tower.layer_decay != 1:
            line = f"{where}.layer_decay: {tower.layer_decay:g} does nothing for a locked tower; set it to 1"
            yield (f"{where}.layer_decay", f"{where}.locked"), line


def _scale(config: Config) -> Iterator[Problem]:
    scale = config.model.logit_scale
    if scale.init is not None and scale.max is not None and scale.init > scale.max:
        line = f"model.logit_scale.init: {scale.init:g} is above model.logit_scale.max {scale.max:g}"
        yield ("model.logit_scale.init", "model.logit_scale.max"), line


def _losses(config: Config) -> Iterator[Problem]:
    terms = terms_of(config.loss)
    kinds = [term.kind for term in terms]
    own_bias = config.model.kind == "folder"  # the weights may bring one
    own_bias = own_bias or (config.model.kind == "open_clip" and config.model.pretrained is not None)
    if "siglip" in kinds and config.model.logit_bias is None and not own_bias:
        line = "loss: siglip needs a learned bias; set model.logit_bias to -10 (and model.logit_scale.init to 10)"
        yield ("loss", "model.logit_bias"), line
    if set(kinds) == {"cyclip"}:
        line = "loss: cyclip is a regulariser, which constant features satisfy; use a list with another loss, "
        line += "[{kind: infonce}, {kind: cyclip}]"
        yield ("loss",), line
    for i, term in enumerate(terms):
        where = f"loss[{i}]" if isinstance(config.loss, tuple) else "loss"
        if term.weight != 1 and not isinstance(config.loss, tuple):
            line = (
                f"loss.weight: {term.weight:g} does nothing for a single loss; change optim.lr, or use a list of losses"
            )
            yield ("loss",), line
        if term.kind == "margin" and term.warmup_steps and term.negatives != "hardest":
            line = f"{where}.warmup_steps: {term.warmup_steps} steps of warm-up need negatives: hardest "
            line += f"(negatives: {term.negatives}); set that, or warmup_steps to 0"
            yield ("loss",), line
        if term.kind not in ("cyclip", "custom") and term.tile is None and term.exchange == "ring":
            line = f"{where}.exchange: ring passes tiles on; use it with {where}.tile auto, or gather with null"
            yield ("loss",), line
        if term.kind == "distillation" and config.data.caption_variants:
            line = (
                f"data.caption_variants: the teacher of {where} has read each sample's first caption only; set it to 0"
            )
            yield ("data.caption_variants", "loss"), line


def _augmentation(config: Config) -> Iterator[Problem]:
    low, high = config.data.augment.crop
    if not 0 < low <= high:
        line = f"data.augment.crop: expected [from, to] with 0 < from <= to <= 1 (value [{low:g}, {high:g}])"
        yield ("data.augment.crop",), line


def _cached_features(config: Config) -> Iterator[Problem]:
    if config.data.cache != "features":
        return
    if not (config.model.image.locked and config.model.text.locked):
        line = "data.cache: features needs model.image.locked and model.text.locked true; "
        line += "lock both, or use pixels"
        yield ("data.cache", "model.image.locked", "model.text.locked"), line
    augment = config.data.augment
    still = augment.crop == (1.0, 1.0) and augment.ratio == 1.0
    still = still and not any((augment.flip, augment.rotate, augment.color, augment.grayscale, augment.tint))
    if not still or config.data.caption_variants:
        line = "data.cache: features needs images and captions that stay the same; "
        line += "use data.augment {crop: [1, 1], ratio: 1} and data.caption_variants 0"
        yield ("data.cache", "data.augment", "data.caption_variants"), line


def _evaluation(config: Config) -> Iterator[Problem]:
    every, best = config.eval.every, config.checkpoint.keep_best
    if best is not None and every is None:
        line = f"checkpoint.keep_best: {best} is told by validations during the run; set eval.every, or keep_best null"
        yield ("checkpoint.keep_best", "eval.every"), line
    stop = config.eval.stop
    if stop is not None and every is None:
        line = f"eval.stop: {stop.metric} is told by validations during the run; set eval.every, or eval.stop to null"
        yield ("eval.stop", "eval.every"), line
    if stop is not None and stop.mode == "min" and best == stop.metric:
        line = f"checkpoint.keep_best: keeps the largest {best}, and eval.stop.mode min wants the smallest; "
        line += "set keep_best to null"
        yield ("checkpoint.keep_best", "eval.stop"), line
    if every is not None and config.data.validation is None:
        line = f"eval.every: {every} needs data.validation, which is null; set that, or eval.every to null"
        yield ("eval.every", "data.validation"), line
    names = {"validation", "training", "report"}  # the other parts of the results
    for i, labelled in enumerate(config.eval.labelled):
        where = f"eval.labelled[{i}]"
        if "probe" in labelled.tasks and labelled.train is None:
            line = f"{where}.train: the probe needs a training split; name it, or set tasks to [zeroshot]"
            yield (f"{where}.train", f"{where}.tasks"), line
        if labelled.name in names:
            yield (
                (f"{where}.name",),
                f"{where}.name: '{labelled.name}' is taken; choose another name",
            )
        names.add(labelled.name)


def _sharding(config: Config) -> Iterator[Problem]:
    """What has not been made to work, and tested, with weights in shares."""
    if config.train.sharding == "none":
        return
    if config.train.precision == "fp16":
        line = "train.precision: fp16 does not go with train.sharding fsdp; use bf16 or fp32"
        yield ("train.precision", "train.sharding"), line
    unfit = {"optim.ema": config.optim.ema is not None, "track.mfu": config.track.mfu}
    for tower in ("image", "text"):
        choice = getattr(config.model, tower)
        unfit |= {f"model.{tower}.lora": choice.lora is not None}
        unfit |= {f"model.{tower}.unfreeze_at": choice.unfreeze_at is not None}
    for key in (key for key, wrong in unfit.items() if wrong):
        line = f"{key}: does not go with train.sharding fsdp; leave one of them out"
        yield (key, "train.sharding"), line


def _compiling(config: Config) -> Iterator[Problem]:
    """What has not been made to work, and tested, with compiled towers; and where there is nothing to compile."""
    if config.train.compile == "none":
        return
    if config.model.image.locked and config.model.text.locked:
        line = "train.compile: towers does nothing with both towers locked, which run as in use; set it to none"
        yield ("train.compile", "model.image.locked", "model.text.locked", "data.cache"), line
    unfit = {
        # with dropout, the pass without gradients and the one with them are compiled apart, and draw other masks
        "train.chunk": config.train.chunk is not None,
        "train.sharding": config.train.sharding != "none",
        "train.gradient_checkpointing": config.train.gradient_checkpointing,
        "track.mfu": config.track.mfu,
    }
    for key in (key for key, wrong in unfit.items() if wrong):
        line = f"{key}: does not go with train.compile towers; leave one of them out"
        yield (key, "train.compile"), line

"""Keys that have a value other than the default, and do nothing together with the other keys.

The values are compared with the defaults, and not with what a file says: `dump_yaml` writes every key.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from contrastive.config.losses import terms_of

if TYPE_CHECKING:
    from contrastive.config.block import Block
    from contrastive.config.recipe import Config

FUSED = ("infonce", "dcl", "sogclr")  # the losses that `train.fused_loss` compiles a part of


def keys_without_effect(config: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    """See `impossible_combinations`."""
    yield from _warmup(config)
    yield from _model(config)
    yield from _losses(config)
    yield from _data(config)
    yield from _during_the_run(config)
    yield from _labelled(config)


def _changed(block: Block, *names: str) -> list[str]:
    """Those of the keys that have another value than the default."""
    fields = type(block).model_fields
    return [name for name in names if getattr(block, name) != fields[name].get_default(call_default_factory=True)]


def _nothing(key: str, value: Any, why: str, remedy: str, *others: str) -> tuple[tuple[str, ...], str]:
    return (key, *others), f"{key}: {value} does nothing {why}; {remedy}"


def _warmup(config: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    warmup, train = config.optim.warmup, config.train
    if not isinstance(warmup, int) or not warmup:
        return
    if train.minutes is not None:
        line = (
            f"optim.warmup: {warmup} steps may not fit into a run of train.minutes, whose steps are known at its end "
        )
        yield ("optim.warmup", "train.minutes"), line + "only; give a share of the run such as 5%"
    if train.samples is not None and warmup > (steps := math.ceil(train.samples / train.global_batch)):
        line = f"optim.warmup: {warmup} steps of warm-up do not fit into train.samples {train.samples}, {steps} steps"
        yield ("optim.warmup", "train.samples", "train.global_batch"), line


def _model(config: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    model = config.model
    if model.kind == "open_clip" and model.pretrained is not None:
        for name in _changed(model.logit_scale, "init"):
            yield _nothing(
                f"model.logit_scale.{name}", getattr(model.logit_scale, name),
                "with model.pretrained, whose weights bring their own scale", "leave it out", "model.pretrained",
            )  # fmt: skip
    if model.kind == "pair":
        text, tokenizer = model.text, model.tokenizer
        if tokenizer.kind == "trained" and tokenizer.path is not None:
            for name in _changed(tokenizer, "vocab_size", "lowercase"):
                yield _nothing(
                    f"model.tokenizer.{name}", getattr(tokenizer, name),
                    "with model.tokenizer.path, where a trained tokenizer lies", "leave one of them out",
                    "model.tokenizer.path",
                )  # fmt: skip
        if text.kind == "transformer" and not text.depth:
            names = ("heads",) if text.pool == "end" else ("heads", "causal")
            for name in _changed(text, *names):
                yield _nothing(
                    f"model.text.{name}", getattr(text, name), "in a text tower of depth 0, which has no attention",
                    "leave it out, or set model.text.depth", "model.text.depth", "model.text.pool",
                )  # fmt: skip
    if config.train.gradient_checkpointing and model.image.locked and model.text.locked:
        yield _nothing(
            "train.gradient_checkpointing", "true", "with both towers locked, which have no backward pass",
            "set it to false", "model.image.locked", "model.text.locked",
        )  # fmt: skip


def _losses(config: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    terms = terms_of(config.loss)
    if config.train.fused_loss and not any(term.kind in FUSED and term.tile is not None for term in terms):
        yield _nothing(
            "train.fused_loss", "true", f"without a loss in tiles of the kind {', '.join(FUSED)}", "set it to false",
            "loss",
        )  # fmt: skip
    for i, term in enumerate(terms):
        if term.kind == "sogclr" and term.rho is not None and not config.model.logit_scale.learned:
            where = f"loss[{i}].rho" if isinstance(config.loss, tuple) else "loss.rho"
            yield _nothing(
                where, f"{term.rho:g}", "with a scale that does not learn",
                "set it to null, or model.logit_scale.learned to true", "loss", "model.logit_scale.learned",
            )  # fmt: skip


def _data(config: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    data = config.data
    if data.decode != "exact" and data.cache != "none":
        yield _nothing(
            "data.decode", data.decode, f"with data.cache {data.cache}, for which images are decoded once, exactly",
            "leave one of them out", "data.cache",
        )  # fmt: skip
    teacher = any(term.kind == "distillation" for term in terms_of(config.loss))
    if data.features is not None and data.cache != "features" and not teacher:
        yield _nothing(
            "data.features", data.features, "without a loss of the kind distillation and without data.cache features",
            "leave it out", "data.cache", "loss",
        )  # fmt: skip
    if _changed(data, "timeout") and (not data.workers or data.cache == "features"):
        yield _nothing(
            "data.timeout", f"{data.timeout:g}", "without workers that load pairs", "leave it out, or set data.workers",
            "data.workers", "data.cache",
        )  # fmt: skip
    change = data.augment
    colours = change.color > 0 or change.grayscale > 0 or change.tint > 0
    if data.compiled is True and not colours and not (data.cache == "pixels" and change.rotate == 0):
        yield _nothing(
            "data.compiled", "true", "without a change of colours and without cached pixels that are not rotated",
            "set it to auto", "data.augment", "data.cache",
        )  # fmt: skip


def _during_the_run(config: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    checkpoint, track = config.checkpoint, config.track
    if checkpoint.every is None:  # `keep` counts those of a run that was stopped and resumed
        for name in _changed(checkpoint, "keep_every"):
            yield _nothing(
                f"checkpoint.{name}", getattr(checkpoint, name), "with checkpoint.every null, so only one at the end",
                "set checkpoint.every, or leave it out", "checkpoint.every",
            )  # fmt: skip
    if config.data.validation is None or track.probe is None:
        missing = "data.validation, which is null" if config.data.validation is None else "track.probe, which is null"
        names = ["probe_every"] if track.probe is None else ["probe", "probe_every"]
        for name in _changed(track, *names):
            yield _nothing(
                f"track.{name}", getattr(track, name), f"without {missing}", "set that, or leave it out",
                "track.probe", "data.validation",
            )  # fmt: skip


def _labelled(config: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    for i, labelled in enumerate(config.eval.labelled):
        where = f"eval.labelled[{i}]"
        for name, task, others in (("train", "probe", "the probe"), ("templates", "zeroshot", "zero-shot")):
            if task not in labelled.tasks and _changed(labelled, name):
                yield _nothing(
                    f"{where}.{name}", getattr(labelled, name), f"without {others}", f"leave it out, or add {task} to "
                    f"{where}.tasks", f"{where}.tasks",
                )  # fmt: skip

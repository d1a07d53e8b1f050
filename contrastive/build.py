"""The only place where a configuration becomes objects."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, ProjectConfiguration
from numpy.typing import NDArray
from tokenizers import Tokenizer as FastTokenizer
from torch import nn

from contrastive.build_stages import build_curriculum, changes_size, curriculum_identity, prepare_towers
from contrastive.config import (
    Config,
    CustomLossConfig,
    CyCLIPConfig,
    DCLConfig,
    DistillationConfig,
    FolderModelConfig,
    HuggingFaceTextConfig,
    HuggingFaceTokenizerConfig,
    InfoNCEConfig,
    MarginConfig,
    OpenClipModelConfig,
    OpenClipTokenizerConfig,
    PairModelConfig,
    SigLIPConfig,
    SogCLRConfig,
    TowerConfig,
    TrainedTokenizerConfig,
    terms_of,
)
from contrastive.config.spans import SECONDS, period_parts
from contrastive.errors import UserError
from contrastive.losses import (
    DCL,
    CustomLoss,
    CyCLIP,
    Distillation,
    InfoNCE,
    Margin,
    SigLIP,
    SogCLR,
    WeightedSum,
)
from contrastive.models import (
    CorpusTokenizer,
    HuggingFaceTextTower,
    OpenClipTokenizer,
    TimmImageTower,
    Tokenizer,
    TransformerTextTower,
    TwoTower,
    add_adapters,
    describe,
    load,
    open_clip_model,
)
from contrastive.shards import Augment, FeatureLoader, Mixture, PairLoader, ShardIndex, TokenCache, open_index
from contrastive.training import (
    Duration,
    EarlyStop,
    Every,
    ProbeBatch,
    Schedule,
    Skips,
    Trainer,
    Until,
    adamw,
    check_share,
    check_trackers,
    shard,
)
from contrastive.training.curriculum import Settings


class FrozenFeatures(NamedTuple):
    """What `FeatureLoader` takes: rows as in the data, see there."""

    image: NDArray[np.float32]
    text: NDArray[np.float32]
    rejected: dict[int, str]


def build_accelerator(config: Config) -> Accelerator:
    """accelerate's view of the machine: precision, processes, trackers.

    Raises:
        UserError: the precision is not to be had on this device, or a tracker is not installed.
    """
    precision = config.train.precision
    on_cpu = not torch.accelerator.is_available()
    if precision == "auto":
        precision = "bf16" if on_cpu or torch.cuda.is_bf16_supported() else "fp32"
    if precision == "fp16" and on_cpu:
        raise UserError("train.precision: fp16 needs an accelerator and there is none here; use bf16 or fp32")
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    try:
        accelerator = Accelerator(
            # Without this, accelerate takes the ranks of a launcher on a machine without GPUs for lone processes.
            cpu=on_cpu,
            mixed_precision="no" if precision == "fp32" else precision,
            log_with=list(config.track.trackers) or None,
            project_config=ProjectConfiguration(config.run.dir, logging_dir=str(Path(config.run.dir) / "tensorboard")),
            # Gradients live in DDP's buckets, so that averaging copies nothing.
            kwargs_handlers=[
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
                # Indexing a large set and validating are one rank's work while the others wait.
                InitProcessGroupKwargs(timeout=timedelta(hours=2)),
            ],
        )
    except (ValueError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"accelerate refuses train.precision {config.train.precision} with track.with "
            f"{list(config.track.trackers)}: {reason}"
        ) from None
    check_trackers(accelerator, config.track.trackers)
    return accelerator


def build_tokenizer(config: PairModelConfig, trained: str) -> Tokenizer:
    """The tokenizer of a pair; `trained` is the text of a trained one, for recipes that name none."""
    choice = config.tokenizer
    match choice:
        case OpenClipTokenizerConfig():
            return OpenClipTokenizer(context=choice.context)
        case HuggingFaceTokenizerConfig():
            return CorpusTokenizer(resolve_path(choice.path), context=choice.context)
        case TrainedTokenizerConfig():
            source = FastTokenizer.from_str(trained) if choice.path is None else choice.path
            return CorpusTokenizer(source, context=choice.context)


def wants_training(config: Config) -> TrainedTokenizerConfig | None:
    """The tokenizer block of a recipe whose tokenizer is to be trained on the run's own captions, else None."""
    if isinstance(config.model, PairModelConfig) and isinstance(config.model.tokenizer, TrainedTokenizerConfig):
        return config.model.tokenizer if config.model.tokenizer.path is None else None
    return None


def build_model(config: Config, trained_tokenizer: str = "") -> TwoTower:
    """The two-tower model of a recipe with its starting weights, on the CPU; see `build_tokenizer`."""
    torch.manual_seed(config.run.seed)
    model = _build_towers(config, trained_tokenizer)
    for tower, choice in _towers(config).items():
        if choice.lora is not None:
            options = choice.lora.model_dump(exclude={"targets"})
            targets = None if choice.lora.targets == "auto" else choice.lora.targets
            add_adapters(model, tower, **options, targets=targets)
    if config.train.gradient_checkpointing:
        model.checkpoint_gradients()
    if config.train.channels_last:
        model.use_channels_last()
    prepare_towers(config, model)
    return model


def _towers(config: Config) -> dict[str, TowerConfig]:
    return {"image": config.model.image, "text": config.model.text}


def _build_towers(config: Config, trained_tokenizer: str) -> TwoTower:
    model_config = config.model
    if isinstance(model_config, FolderModelConfig):
        return _open_start(model_config, name=Path(config.run.dir).name)
    common: dict[str, Any] = {
        "scale_init": model_config.logit_scale.init,
        "scale_max": model_config.logit_scale.max,
        "scale_learned": model_config.logit_scale.learned,
        "bias": model_config.logit_bias,
        "lock_image": model_config.image.locked,
        "lock_text": model_config.text.locked,
    }
    if isinstance(model_config, OpenClipModelConfig):
        return open_clip_model(model_config.name, pretrained=model_config.pretrained, **common)
    image = model_config.image
    tokenizer = build_tokenizer(model_config, trained_tokenizer)
    return TwoTower(
        TimmImageTower(
            image.name,
            dim=model_config.dim,
            image_size=image.size,
            kwargs=image.kwargs,
            weights=None if image.weights is None else resolve_path(image.weights),
            mean=image.mean,
            std=image.std,
            any_size=changes_size(config),
        ),
        _build_text_tower(model_config, tokenizer),
        tokenizer,
        model_config.dim,
        name=Path(config.run.dir).name,
        **common,
    )


def _open_start(config: FolderModelConfig, name: str) -> TwoTower:
    """The saved model that a recipe starts from; `name` is what its fine-tuned self is called."""
    if not Path(resolve_path(config.path)).is_dir():
        raise UserError(f"model.path: {config.path} does not exist; name a run folder or a model folder")
    model = load(resolve_path(config.path), device="cpu")
    if model.open_clip_config is None:  # there it is the architecture's
        model.name = name
    scale = config.logit_scale
    model.scale_max = scale.max or model.scale_max
    if scale.init is not None:
        model.logit_scale.data.fill_(math.log(scale.init))
    model.logit_scale.requires_grad_(scale.learned)
    if config.logit_bias is not None:
        model.logit_bias = nn.Parameter(torch.tensor(config.logit_bias))
    for tower in ("image", "text"):
        if getattr(config, tower).locked:
            model.lock(tower)
    return model


def _build_text_tower(config: PairModelConfig, tokenizer: Tokenizer) -> Any:
    text = config.text
    if isinstance(text, HuggingFaceTextConfig):
        return HuggingFaceTextTower(resolve_path(text.path), config.dim, pool=text.pool, pad_id=tokenizer.pad_id)
    return TransformerTextTower(
        tokenizer.vocab_size,
        config.dim,
        tokenizer.context,
        width=text.width,
        depth=text.depth,
        heads=text.heads,
        pool=text.pool,
        causal=text.causal,
        dropout=text.dropout,
        pad_id=tokenizer.pad_id,
    )


def resolve_path(path: str) -> str:
    """`path`, where ``package:NAME/FILE`` means a file inside an installed Python package."""
    if not path.startswith("package:"):
        return path
    from importlib.util import find_spec

    package, _, inside = path.removeprefix("package:").partition("/")
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{path}: the package {package} is not installed; see the header of the recipe")
    return str(Path(next(iter(spec.submodule_search_locations))) / inside)


class Teacher(NamedTuple):
    """What a teacher makes of the training set: rows as in the index, L2-normalised; and its logit scale."""

    image: torch.Tensor
    text: torch.Tensor
    scale: float


def build_loss(config: Config, samples: int, teachers: Mapping[str, Teacher]) -> nn.Module:
    """The loss of a recipe.

    Args:
        samples: the size of the training set, for a loss that keeps something for each sample.
        teachers: by the name that the recipe gives them.
    """
    terms = [(_build_term(term, samples, teachers), term.weight) for term in terms_of(config.loss)]
    if not isinstance(config.loss, tuple):
        return terms[0][0]
    kinds = [term.kind for term in config.loss]
    names = [f"{kind}{i}" if kinds.count(kind) > 1 else kind for i, kind in enumerate(kinds)]
    return WeightedSum([(name, loss, weight) for name, (loss, weight) in zip(names, terms, strict=True)])


def _build_term(term: Any, samples: int, teachers: Mapping[str, Teacher]) -> nn.Module:
    options = term.model_dump(exclude={"kind", "weight"})
    match term:
        case InfoNCEConfig():
            return InfoNCE(**options)
        case DCLConfig():
            return DCL(**options)
        case SigLIPConfig():
            return SigLIP(**options)
        case MarginConfig():
            return Margin(**options)
        case CyCLIPConfig():
            return CyCLIP(**options)
        case SogCLRConfig():
            return SogCLR(samples, **options)
        case DistillationConfig():
            teacher = teachers[options.pop("teacher")]
            options["teacher_scale"] = options["teacher_scale"] or teacher.scale
            return Distillation(teacher.image, teacher.text, **options)
        case CustomLossConfig():
            return CustomLoss(term.path, term.args)
        case _:
            raise AssertionError(term)


def build_data(config: Config) -> Mixture:
    """The training sets of a recipe, as one.

    Raises:
        UserError: a set cannot be opened, or indexing left out more of one than ``data.max_skip_rate``.
    """
    parts = []
    for path in config.data.train_sets:
        index = open_index(path)
        check_share(index.rejected, len(index), config.data.max_skip_rate, path)
        parts.append(index)
    return Mixture(parts, list(config.data.train_sets.values()))


def token_cache(model: TwoTower, context: int | None = None) -> TokenCache:
    """The model's tokenizer with a memory, for one loader; `context`: the tokens that are kept, where fewer."""
    if context is not None and context < model.tokenizer.context:
        return TokenCache(model.tokenizer.shortened(context), model.tokenizer.pad_id)
    width = None if model.text.cuts_text else model.tokenizer.context
    return TokenCache(model.tokenize, model.tokenizer.pad_id, width=width)


def build_augment(config: Config) -> Augment:
    """The augmentation of a recipe."""
    return Augment(**config.data.augment.model_dump())


def build_duration(config: Config, samples: int) -> Duration:
    """The duration of a recipe; an epoch is `samples` pairs, and a started step is a step."""
    train = config.train
    if train.minutes is not None:
        return Duration(minutes=train.minutes)
    if train.steps is not None:
        return Duration(steps=train.steps)
    wanted = train.samples if train.samples is not None else round((train.epochs or 0) * samples)
    return Duration(steps=max(1, math.ceil(wanted / train.global_batch)))


def share_or_steps(value: int | str | None) -> int | float | None:
    """``"5%"`` → 0.05; a number of steps stays one."""
    return float(value[:-1]) / 100 if isinstance(value, str) else value


def check_batch(config: Config, data: Mixture) -> None:
    """Raise UserError for a global batch that takes more pairs of a set than there are."""
    batch = config.train.global_batch
    for path, part, weight in zip(config.data.train_sets, data.parts, data.weights, strict=True):
        share = math.ceil(batch * weight / sum(data.weights))
        if share > len(part):
            taken = f"{batch}" if share == batch else f"{batch} takes {share} of one set at once, which"
            raise UserError(f"train.global_batch: {taken} is more than the {len(part)} pairs of {path}")


def build_every(value: int | str | None, epoch: int, batch: int) -> Every | None:
    """``500``, ``"5%"``, ``"10m"``, ``"2 epochs"``, ``"50000 samples"``; an epoch is `epoch` pairs."""
    if value is None or isinstance(value, int):
        return None if value is None else Every(steps=value)
    if value.endswith("%"):
        return Every(share=float(value[:-1]) / 100)
    number, unit = period_parts(value)
    if unit in SECONDS:
        return Every(seconds=number * SECONDS[unit])
    return Every(steps=max(1, round(number * (epoch if unit == "epoch" else 1) / batch)))


def build_unfreezing(config: Config, epoch: int, duration: Duration) -> dict[str, Until]:
    """Until where each tower is locked, of those that are for a while; an epoch is `epoch` pairs.

    Raises:
        UserError: the run ends before that.
    """
    until = {}
    for tower, choice in _towers(config).items():
        every = build_every(choice.unfreeze_at, epoch, config.train.global_batch)
        if every is None:
            continue
        if every.steps is not None and duration.steps is not None and every.steps >= duration.steps:
            raise UserError(
                f"model.{tower}.unfreeze_at: {choice.unfreeze_at} is step {every.steps} of a run of {duration.steps}; "
                f"set it lower, or model.{tower}.locked to true"
            )
        until[tower] = Until(steps=every.steps, share=every.share)
    return until


def build_schedule(config: Config) -> Schedule:
    """Warm-up and shape of the learning rate."""
    warmup = share_or_steps(config.optim.warmup)
    if isinstance(warmup, float):
        return Schedule(warmup_share=warmup, shape=config.optim.schedule)
    return Schedule(warmup_steps=warmup or 0, shape=config.optim.schedule)


def build_trainer(
    config: Config,
    accelerator: Accelerator,
    model: TwoTower,
    data: Mixture,
    *,
    features: FrozenFeatures | None = None,
    teachers: Mapping[str, Teacher] | None = None,
    validate: Callable[[Any], dict[str, float]] | None = None,
    validation_index: ShardIndex | None = None,
    quiet: bool = False,
) -> Trainer:
    """The trainer of a recipe over the pairs of `data`.

    Args:
        features: of all samples of `data`, where ``data.cache`` asks for them.
        teachers: those that the recipe's loss names, see `build_loss`.
        validation_index: what ``track.probe`` is taken from.

    Raises:
        UserError: the global batch does not divide by the number of processes, or takes more pairs of a set than there
            are; the model does not allow the chunks of ``train.chunk``.
    """
    world, batch = accelerator.num_processes, config.train.global_batch
    check_batch(config, data)
    duration = build_duration(config, data.epoch_size)
    curriculum = build_curriculum(config, model, duration, data.epoch_size)
    model.to(accelerator.device)

    def make_loader(start_step: int, stage: Settings = curriculum.last) -> PairLoader | FeatureLoader:
        place: dict[str, Any] = {"global_batch": batch, "rank": accelerator.process_index, "world": world}
        place |= {"seed": config.run.seed, "window": config.data.window, "start_step": start_step}
        if features is not None:
            return FeatureLoader(data, *features, **place)
        return PairLoader(
            data,
            tokenize=token_cache(model, stage.context),
            image_size=stage.image_size or model.image_size,
            augment=build_augment(config),
            workers=config.data.workers,
            timeout=config.data.timeout,
            decode=config.data.decode,
            caption_variants=config.data.caption_variants,
            cache=config.data.cache == "pixels",
            **place,
        )

    probe_every = config.track.probe_every if config.track.probe and config.data.validation else None
    towers = _towers(config)
    layer_decay = {tower: choice.layer_decay for tower, choice in towers.items() if choice.layer_decay != 1}
    network: nn.Module = model
    twin = None
    if world > 1 and config.train.sharding == "fsdp":
        twin = copy.deepcopy(model) if accelerator.is_main_process else None
        network = shard(accelerator.prepare_model(model, evaluation_mode=True), accelerator.device)
    elif world > 1:
        network = _synchronise_batch_norm(model, accelerator)
    return Trainer(
        accelerator,
        network,
        build_loss(config, len(data), teachers or {}),
        adamw(
            network,
            lr=config.optim.lr,
            weight_decay=config.optim.weight_decay,
            betas=config.optim.betas,
            eps=config.optim.eps,
            tower_lr={tower: choice.lr_scale for tower, choice in towers.items()},
            layer_decay=layer_decay,
            layers={name: layer for tower in layer_decay for name, layer in model.layers(tower).items()},
        ),
        build_schedule(config),
        duration,
        make_loader,
        Skips(
            config.data.max_skip_rate,
            data.epoch_size,
            batch,
            Path(config.run.dir) / "rejected.jsonl" if accelerator.is_main_process else None,
        ),
        run_dir=Path(config.run.dir),
        global_batch=batch,
        identity={
            "model": {**describe(model), "name": None},
            "loss": [term.kind for term in terms_of(config.loss)],
            "locked towers": list(model.locked),
            "adapters": model.adapters or None,
            "layer decay": layer_decay or None,
            "curriculum": curriculum_identity(config),
        },
        curriculum=curriculum,
        clip=config.optim.clip,
        chunk=config.train.chunk,
        unfreeze_at=build_unfreezing(config, data.epoch_size, duration),
        checkpoint_every=build_every(config.checkpoint.every, data.epoch_size, batch),
        keep=config.checkpoint.keep,
        keep_every=config.checkpoint.keep_every,
        keep_best=config.checkpoint.keep_best,
        max_skipped=config.optim.max_skipped,
        step_timeout=config.train.step_timeout,
        validate=validate,
        validate_every=build_every(config.eval.every, data.epoch_size, batch),
        probe=build_probe(config, model, validation_index) if accelerator.is_main_process else None,
        probe_every=build_every(probe_every, data.epoch_size, batch),
        mfu=config.track.mfu,
        log_every=config.track.log_every,
        quiet=quiet,
        ema=None if config.optim.ema is None else (config.optim.ema.decay, config.optim.ema.every),
        twin=twin,
        stop=None if config.eval.stop is None else EarlyStop(**config.eval.stop.model_dump()),
    )


def build_probe(config: Config, model: TwoTower, index: ShardIndex | None) -> ProbeBatch | None:
    """The batch of ``track.probe``: pairs of the validation shards that every run draws alike, as evaluation sees them.

    None without validation shards, or where fewer than two of these pairs can be read.
    """
    if config.track.probe is None or index is None or len(index) < 2:
        return None
    place: dict[str, Any] = {"global_batch": min(config.track.probe, len(index)), "seed": 0, "steps": 1}
    loader = PairLoader(index, tokenize=token_cache(model), image_size=model.image_size, augment=None, **place)
    batch = next(iter(loader))
    return ProbeBatch(batch) if int(batch.valid.sum()) >= 2 else None


def _synchronise_batch_norm(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Batch statistics over all processes where torch can (CUDA); elsewhere the difference is said."""
    if not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in model.modules()):
        return model
    if accelerator.device.type == "cuda":
        from timm.layers import convert_sync_batchnorm

        converted: nn.Module = convert_sync_batchnorm(model)
        return converted
    accelerator.print(
        f"note: this model has batch normalisation, and torch synchronises its statistics on CUDA only: each of the "
        f"{accelerator.num_processes} processes normalises its own share of the batch, so this run is close to, but "
        "not the same as, the run on one process. A tower with layer or group normalisation is exact."
    )
    return model

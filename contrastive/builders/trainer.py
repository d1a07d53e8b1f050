"""From a recipe, a model and data to the trainer on this machine."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
)
from accelerate.utils.environment import parse_flag_from_env
from numpy.typing import NDArray
from torch import nn

from contrastive.builders.data import build_augment, check_batch, token_cache, uses_compiled
from contrastive.builders.loss import Teacher, build_loss
from contrastive.builders.model import towers_of
from contrastive.builders.spans import build_duration, build_every, build_schedule, build_unfreezing
from contrastive.builders.stages import build_curriculum, curriculum_identity
from contrastive.config import (
    Config,
    terms_of,
)
from contrastive.config.combinations import LENGTHS
from contrastive.errors import UserError
from contrastive.models import (
    TwoTower,
    describe,
)
from contrastive.run_folder import RunFolder
from contrastive.shards import FeatureLoader, Mixture, PairLoader, ShardIndex
from contrastive.training import (
    EarlyStop,
    ProbeBatch,
    Skips,
    Trainer,
    adamw,
    check_tracker_names,
    check_trackers,
    shard,
)
from contrastive.training.compiling import compile_towers
from contrastive.training.curriculum import Settings
from contrastive.training.launcher_settings import check_launcher_settings, notes_on_settings
from contrastive.training.memory import keep_freed_memory
from contrastive.training.rates import Rates


class FrozenFeatures(NamedTuple):
    """What `FeatureLoader` takes: rows as in the data, see there."""

    image: NDArray[np.float32]
    text: NDArray[np.float32]
    rejected: dict[int, str]


def build_accelerator(config: Config) -> Accelerator:
    """accelerate's view of the machine: precision, processes, trackers.

    Sets the process up for it too: `train.threads`, and on a CPU freed memory is kept, see `keep_freed_memory`.

    Raises:
        UserError: the device does not have the precision, a tracker is not installed, or the environment has settings
            that would change the run, see `check_launcher_settings`.
    """
    check_launcher_settings()
    precision = config.train.precision
    # `accelerate launch --cpu` sets it
    cpu_asked = parse_flag_from_env("ACCELERATE_USE_CPU") and torch.accelerator.is_available()
    on_cpu = cpu_asked or not torch.accelerator.is_available()
    if precision == "auto":
        precision = "bf16" if on_cpu or torch.cuda.is_bf16_supported() else "fp32"
    if precision == "fp16" and on_cpu:
        raise UserError("train.precision: fp16 needs an accelerator and there is none here; use bf16 or fp32")
    check_tracker_names(config.track.trackers)
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    if on_cpu:
        keep_freed_memory()
    tensorboard = RunFolder(Path(config.run.dir)).tensorboard
    try:
        accelerator = Accelerator(
            # Without this, accelerate takes the ranks of a launcher on a machine without GPUs for lone processes.
            cpu=on_cpu,
            mixed_precision="no" if precision == "fp32" else precision,
            # Without these two, accelerate takes them from the environment, see `launcher_settings`.
            dynamo_backend="no",
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            log_with=list(config.track.trackers) or None,
            project_config=ProjectConfiguration(config.run.dir, logging_dir=str(tensorboard)),
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
    for note in notes_on_settings(precision, cpu_asked):
        accelerator.print(note, flush=True)
    return accelerator


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
    if config.train.compile == "towers":
        compile_towers(model)

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
            compiled=uses_compiled(config),
            **place,
        )

    probe_every = config.track.probe_every if config.track.probe and config.data.validation else None
    towers = towers_of(config)
    layer_decay = {tower: choice.layer_decay for tower, choice in towers.items() if choice.layer_decay != 1}
    network: nn.Module = model
    twin = None
    if world > 1 and config.train.sharding == "fsdp":
        twin = copy.deepcopy(model) if accelerator.is_main_process else None
        network = shard(accelerator.prepare_model(model, evaluation_mode=True), accelerator.device)
    elif config.train.sharding == "fsdp":
        accelerator.print("note: train.sharding fsdp does nothing on one process, which keeps all weights")
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
        build_schedule(config, duration),
        duration,
        make_loader,
        Skips(
            config.data.max_skip_rate,
            data.epoch_size,
            batch,
            RunFolder(Path(config.run.dir)).rejected if accelerator.is_main_process else None,
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
        rates=build_rates(config),
        twin=twin,
        stop=None if config.eval.stop is None else EarlyStop(**config.eval.stop.model_dump()),
    )


def build_rates(config: Config) -> Rates:
    """The highest rate of each tower, and the keys that decide the rate at a step."""
    optim, train = config.optim, config.train
    length = next(name for name in LENGTHS if getattr(train, name) is not None)
    settings = {"optim.lr": optim.lr, "optim.warmup": optim.warmup, "optim.schedule": optim.schedule}
    scales = {tower: choice.lr_scale for tower, choice in towers_of(config).items()}
    settings |= {f"model.{tower}.lr_scale": scale for tower, scale in scales.items()}
    settings |= {f"train.{length}": getattr(train, length)}
    return Rates({tower: optim.lr * scale for tower, scale in scales.items()}, settings)


def build_probe(config: Config, model: TwoTower, index: ShardIndex | None) -> ProbeBatch | None:
    """The batch of ``track.probe``: pairs of the validation shards that every run draws alike, as evaluation sees them.

    None without validation shards, or where fewer than two of these pairs can be read.
    """
    if config.track.probe is None or index is None or len(index) < 2:
        return None
    place: dict[str, Any] = {"global_batch": min(config.track.probe, len(index)), "seed": 0, "steps": 1}
    loader = PairLoader(
        index,
        tokenize=token_cache(model),
        image_size=model.image_size,
        augment=None,
        preprocessing=model.preprocessing,
        **place,
    )
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

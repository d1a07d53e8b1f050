"""The only place where a configuration becomes objects."""

from contrastive.builders.data import (
    build_augment,
    build_data,
    check_batch,
    has_work_for_compiled,
    token_cache,
    uses_compiled,
)
from contrastive.builders.loss import Teacher, build_loss
from contrastive.builders.model import build_model, build_tokenizer, resolve_path, wants_training
from contrastive.builders.spans import build_duration, build_every, build_schedule, build_unfreezing, share_or_steps
from contrastive.builders.stages import build_curriculum
from contrastive.builders.trainer import FrozenFeatures, build_accelerator, build_probe, build_trainer

__all__ = [
    "FrozenFeatures",
    "Teacher",
    "build_accelerator",
    "build_augment",
    "build_curriculum",
    "build_data",
    "build_duration",
    "build_every",
    "build_loss",
    "build_model",
    "build_probe",
    "build_schedule",
    "build_tokenizer",
    "build_trainer",
    "build_unfreezing",
    "check_batch",
    "has_work_for_compiled",
    "resolve_path",
    "share_or_steps",
    "token_cache",
    "uses_compiled",
    "wants_training",
]

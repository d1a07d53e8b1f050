"""The training loop, its step, checkpoints, schedule and tracking."""

from contrastive.training.checkpoint import list_checkpoints
from contrastive.training.optimizer import adamw
from contrastive.training.schedule import Duration, Schedule
from contrastive.training.tracking import append_metrics, environment, read_metrics
from contrastive.training.trainer import NonFiniteLoss, Trainer

__all__ = [
    "Duration",
    "NonFiniteLoss",
    "Schedule",
    "Trainer",
    "adamw",
    "append_metrics",
    "environment",
    "list_checkpoints",
    "read_metrics",
]

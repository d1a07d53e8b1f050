"""The training loop, its step, checkpoints, schedule and tracking."""

from contrastive.training.checkpoint import list_checkpoints
from contrastive.training.optimizer import adamw
from contrastive.training.schedule import Duration, Schedule
from contrastive.training.tracking import environment, read_metrics
from contrastive.training.trainer import NonFiniteLoss, Trainer

__all__ = [
    "Duration",
    "NonFiniteLoss",
    "Schedule",
    "Trainer",
    "adamw",
    "environment",
    "list_checkpoints",
    "read_metrics",
]

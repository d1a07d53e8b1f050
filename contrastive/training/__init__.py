"""The training loop, its step, checkpoints, schedule and tracking."""

from contrastive.training.caching import cached_backward, check_chunkable
from contrastive.training.checkpoint import check_identity, list_checkpoints, newest_whole
from contrastive.training.ema import WeightAverage
from contrastive.training.faults import exit_on_signal
from contrastive.training.final import FinalModel
from contrastive.training.optimizer import adamw
from contrastive.training.patience import EarlyStop
from contrastive.training.probe_batch import ProbeBatch
from contrastive.training.progress import LINE_EVERY_SECONDS
from contrastive.training.schedule import Duration, Every, Point, Schedule
from contrastive.training.sharding import shard
from contrastive.training.skips import Skips, TooManySkips, check_share
from contrastive.training.tracking import append_metrics, check_tracker_names, check_trackers, environment, read_metrics
from contrastive.training.trainer import NonFinite, Trainer

__all__ = [
    "LINE_EVERY_SECONDS",
    "Duration",
    "EarlyStop",
    "Every",
    "FinalModel",
    "NonFinite",
    "ProbeBatch",
    "Schedule",
    "Skips",
    "TooManySkips",
    "Trainer",
    "Point",
    "WeightAverage",
    "adamw",
    "append_metrics",
    "cached_backward",
    "check_chunkable",
    "check_identity",
    "check_share",
    "check_tracker_names",
    "check_trackers",
    "environment",
    "exit_on_signal",
    "list_checkpoints",
    "newest_whole",
    "read_metrics",
    "shard",
]

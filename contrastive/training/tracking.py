"""Where a run's numbers go: ``metrics.jsonl``, accelerate's trackers, and ``environment.json``."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from accelerate.utils import LoggerType

from contrastive.errors import UserError
from contrastive.run_folder import RunFolder


def environment() -> dict[str, Any]:
    """Versions and hardware, so that a result can be placed later."""
    packages = {}
    for name in (
        "contrastive",
        "torch",
        "open_clip_torch",
        "timm",
        "accelerate",
        "tokenizers",
        "numpy",
        "pillow",
    ):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = "not installed"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "packages": packages,
        "command": sys.argv,
    }


class Tracker:
    """Writes a row of numbers to ``metrics.jsonl`` and to the trackers of the accelerator, from the main process.

    A resumed run first drops the rows after the step it goes on from, so that no step stands twice; and, with
    `validates_first`, the validation of that step, which it does again.
    """

    def __init__(
        self, accelerator: Accelerator, run_dir: Path, *, from_step: int = 0, validates_first: bool = False
    ) -> None:
        self.accelerator = accelerator
        self.path = RunFolder(run_dir).metrics
        if accelerator.is_main_process:
            rows = read_metrics(self.path) if from_step else []
            kept = [row for row in rows if row["step"] <= from_step]
            if validates_first:
                kept = [r for r in kept if r["step"] < from_step or not any("validation/" in key for key in r)]
            self.path.write_text("".join(json.dumps(row) + "\n" for row in kept))

    def log(self, step: int, values: dict[str, float]) -> None:
        """One row; keys such as ``train/loss``."""
        if self.accelerator.is_main_process:
            append_metrics(self.path, step, values)
        self.accelerator.log(values, step=step)


def check_tracker_names(names: Sequence[str]) -> None:
    """Refuse a name that accelerate does not know.

    Raises:
        UserError: with those that it does.
    """
    known = {*LoggerType.list(), *LOGGER_TYPE_TO_CLASS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(
            f"track.with: no tracker is called {', '.join(unknown)}; accelerate knows {', '.join(sorted(known))}"
        )


def check_trackers(accelerator: Accelerator, names: Sequence[str]) -> None:
    """Refuse a tracker whose package is missing: accelerate leaves it out without a word.

    Raises:
        UserError: with its name.
    """
    found = {str(tracker) for tracker in accelerator.log_with}
    missing = [name for name in names if name not in found and name != "all"]
    if missing:
        raise UserError(
            f"track.with: {', '.join(missing)} is not installed here; install the package, or leave the name out"
        )


def append_metrics(path: Path, step: int, values: dict[str, float]) -> None:
    """Add a row to a ``metrics.jsonl``. A value that is not finite is written as null: JSON has no NaN."""
    row = {"step": step, **{key: value if math.isfinite(value) else None for key, value in values.items()}}
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``; none when the file does not exist."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:  # the run was killed while it wrote its last line
            continue
    return rows

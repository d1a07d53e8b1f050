"""Which weights a run ends with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from contrastive.training.checkpoint import fault_in, load_weights
from contrastive.training.ema import WeightAverage


@dataclass(frozen=True)
class FinalModel:
    """The weights that a run ends with: those behind `step`, themselves (raw) or their running average (ema).

    choice: the last ones, or the best ones by a validation. stopped_early: why and where the run ended before its
        length was over; None where it did not.
    """

    step: int
    choice: Literal["last", "best"]
    weights: Literal["raw", "ema"]
    stopped_early: str | None = None

    def __str__(self) -> str:
        kept = f"the {self.choice}" + (", the running average" if self.weights == "ema" else "")
        return f"{kept}, step {self.step}" + (f"; {self.stopped_early}" if self.stopped_early else "")


def take_final_weights(
    model: nn.Module,
    average: WeightAverage | None,
    step: int,
    checkpoints: Path,
    *,
    best: tuple[int, float] | None,
    reason: str | None,
) -> FinalModel:
    """Put the weights that a run ends with into `model`: the average where there is one, of the best step where it is
    given, else of the last.

    Args:
        average: of `model`, behind the last `step`. checkpoints: the folder that holds the best one's.
        best: step and value of the best one, which is to be taken. reason: of an early stop.
    """
    weights: Literal["raw", "ema"] = "raw" if average is None else "ema"
    stopped = None if reason is None else f"stopped early at step {step}, {reason}"
    path = None if best is None else checkpoints / f"step_{best[0]}"
    if path is not None and best is not None:
        fault = fault_in(path)
        if fault is None and (average is None or (path / "ema.safetensors").is_file()):
            load_weights(path, model, average=average is not None)
            return FinalModel(best[0], "best", weights, stopped)
        print(f"warning: the best checkpoint, {path}, cannot be taken ({fault or 'no average'}); taking the last one")
    if average is not None:
        average.copy_to_model()
    return FinalModel(step, "last", weights, stopped)

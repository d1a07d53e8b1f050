"""Ends a run whose validation has stopped to improve."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

LOWER_IS_BETTER = ("loss", "error", "rank")  # what a name holds that a mode of "auto" is to bring down


@dataclass
class EarlyStop:
    """Counts the validations in a row that brought no improvement of `metric` over the best so far.

    A value that is no number is no improvement. Every process that is told the same has the same counts.

    Args:
        metric: a name that validation returns. patience: so many validations without an improvement stop the run.
        min_delta: what is an improvement is better by more than this.
        mode: what is better, the larger value or the smaller; auto: the smaller where the name holds loss, error
            or rank.
    """

    metric: str
    patience: int = 3
    min_delta: float = 0.0
    mode: Literal["auto", "max", "min"] = "auto"
    best: float | None = None
    best_step: int = 0
    waited: int = 0

    @property
    def sign(self) -> int:
        """1 where the larger value is the better one, else -1."""
        low = self.mode == "min" or (self.mode == "auto" and any(word in self.metric for word in LOWER_IS_BETTER))
        return -1 if low else 1

    @property
    def stopped(self) -> bool:
        return self.waited >= self.patience

    def observe(self, step: int, value: float) -> None:
        """Count the validation behind `step`."""
        improved = math.isfinite(value)
        if improved and self.best is not None:
            improved = self.sign * (value - self.best) > self.min_delta
        if improved:
            self.best, self.best_step, self.waited = value, step, 0
        else:
            self.waited += 1

    @property
    def reason(self) -> str:
        """Why the run was stopped, for a line of output."""
        if self.best is None:
            return f"{self.metric} was no number in {self.waited} validations"
        more = f" by more than {self.min_delta:g}" if self.min_delta else ""
        way = "risen" if self.sign > 0 else "fallen"
        since = f"since {self.best:.4g} at step {self.best_step}"
        return f"{self.metric} has not {way}{more} in {self.waited} validations {since}"

    def state(self) -> dict[str, Any]:
        """JSON, for `restore`."""
        return asdict(self)

    def restore(self, state: dict[str, Any] | None) -> None:
        """Go on counting; counts of another metric, or the other way round, are none. Patience is this run's."""
        if state is not None and (state["metric"], state["mode"]) == (self.metric, self.mode):
            self.best, self.best_step, self.waited = state["best"], state["best_step"], state["waited"]

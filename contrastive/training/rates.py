"""The learning rates of a run in its checkpoints, so that a resumed run can report a change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Rates:
    """The learning rates of a run, for a checkpoint.

    Args:
        peaks: the highest rate of each tower, by its name.
        settings: what decides the rate at a step, by key of the recipe; JSON.
    """

    peaks: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def state(self, factor: float) -> dict[str, Any]:
        """factor: of the next step, see `Schedule.factor`."""
        return {"factor": factor, "peaks": dict(self.peaks), "settings": dict(self.settings)}

    def change(self, step: int, saved: Mapping[str, Any] | None, factor: float) -> str | None:
        """A line where the next step has another rate than the run that was `saved` would have given it, else None.

        Args:
            step: the last one that was taken.
            saved: of `state`; None in a checkpoint of an earlier version, which does not hold it.
            factor: of the next step now.
        """
        if saved is None:
            return None
        moves: dict[tuple[float, float], list[str]] = {}
        for tower, peak in self.peaks.items():
            before, now = saved["factor"] * saved["peaks"].get(tower, 0.0), factor * peak
            if abs(before - now) > 1e-6 * max(before, now):
                moves.setdefault((before, now), []).append(tower)
        if not moves:
            return None
        rates = []
        for (before, now), towers in moves.items():
            of = "" if len(towers) == len(self.peaks) else f" of the {' and '.join(towers)} tower"
            rates.append(f"{of} changes from {before:.3g} to {now:.3g}")
        changed = ", ".join(
            f"{key} {saved['settings'].get(key)} → {value}"
            for key, value in self.settings.items()
            if saved["settings"].get(key) != value
        )
        return f"note: the learning rate at step {step + 1}{', and'.join(rates)}" + (f" ({changed})" if changed else "")

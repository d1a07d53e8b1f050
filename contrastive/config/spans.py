"""Lengths within a run, as recipes write them: steps, a share of the run, a time, epochs, samples."""

from __future__ import annotations

import re
from typing import Any

from pydantic_core import PydanticCustomError

SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}
_PERIOD = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|h|epochs?|samples?)")


def warmup_span(value: Any) -> int | str:
    """A number of steps, or a share of the run such as "5%"."""
    if _is_steps(value, 0) or (_share(value) is not None and value):
        return value
    text = "expected a number of steps or a share of the run such as 5%, at least 0 and at most 100%"
    raise PydanticCustomError("span", "{text}", {"text": text})


def period(value: Any) -> int | str:
    """How often: a number of steps, a share, or a time ("10m"), epochs ("1 epoch") or samples ("50000 samples")."""
    if _is_steps(value, 1) or _share(value):
        return value
    if isinstance(value, str) and (found := _PERIOD.fullmatch(value)) and float(found[1]) > 0:
        return value
    text = "expected a number of steps, a share of the run such as 5%, or a text such as 10m (s, m, h), 1 epoch or "
    raise PydanticCustomError("span", "{text}", {"text": text + "50000 samples, above 0 and at most 100%"})


def place(value: Any) -> int | str:
    """A place in the run: a number of steps, a share, epochs ("1 epoch") or samples ("50000 samples")."""
    share = _share(value)
    if _is_steps(value, 1) or (share and share < 100):
        return value
    if isinstance(value, str) and (found := _PERIOD.fullmatch(value)) and float(found[1]) > 0:
        if found[2] not in SECONDS:
            return value
    text = "expected a number of steps, a share of the run such as 10%, or a text such as 1 epoch or 50000 samples, "
    raise PydanticCustomError("span", "{text}", {"text": text + "above 0 and below 100%"})


def period_parts(value: str) -> tuple[float, str]:
    """Number and unit of a period that is neither steps nor a share: "s", "m", "h", "epoch" or "sample"."""
    found = _PERIOD.fullmatch(value)
    assert found is not None
    return float(found[1]), found[2] if found[2] in SECONDS else found[2].rstrip("s")


def _is_steps(value: Any, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _share(value: Any) -> float | None:
    """Percent, 0 to 100; None for anything else."""
    if not (isinstance(value, str) and value.endswith("%")):
        return None
    try:
        share = float(value[:-1])
    except ValueError:
        return None
    return share if 0 <= share <= 100 else None

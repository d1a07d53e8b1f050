"""What a reader should know before the numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

REPEATED = 0.01  # of the test images
USUAL_SHOTS = 16
GIVEN_AWAY = 0.6  # right without the image


def reader_warnings(sets: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line for each thing that makes a result of these sets (see `table`) say less than it seems to."""
    lines = []
    for name, found in sets.items():
        lines += [f"{name}: {remark}" for remark in found.get("remarks", ())]
        probe = found.get("probe", {}).get("model", {})
        tried = sorted(float(strength) for strength, _ in probe.get("validation_curve", ()))
        if len(tried) > 1 and float(probe["C"]) in (tried[0], tried[-1]):
            side = "smallest" if float(probe["C"]) == tried[0] else "largest"
            lines.append(
                f"{name}: the best strength of the probe, C = {probe['C']:.3g}, is the {side} that was tried; "
                "the optimum may lie beyond it"
            )
        shots = found.get("shots", ())
        if "fewshot" in found and not found.get("shots_asked") and max(shots, default=0) < USUAL_SHOTS:
            lines.append(f"{name}: few shots end at {max(shots, default=0)}: the smallest class has no more images")
        unread = sum(found.get("rejected", {}).values())
        if unread:
            lines.append(f"{name}: {unread:,} images could not be read and are not counted")
        twins = found.get("duplicates", {}).get("both", 0)
        if twins > REPEATED * found["samples"]:
            lines.append(
                f"{name}: {twins:,} of {found['samples']:,} test images look like training images; see the accuracy "
                "without them"
            )
        order = found.get("composition", {}).get("model", {})
        if order and order["value"] == 0 and order["optimistic"] == 1:
            lines.append(f"{name}: the text tower gives a caption and its swap one embedding: order is lost on it")
        blind = found.get("composition", {}).get("blind", {}).get("value", 0.0)
        if blind > GIVEN_AWAY:
            lines.append(f"{name}: {blind:.0%} of the swapped captions are told apart without looking at the image")
    return lines

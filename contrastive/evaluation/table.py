"""The results of a run as rows: the text table at its end, and the same rows for the report.

`results` is what `results.json` holds: `{"run": name, "sets": {name: results of evaluate_pairs or
evaluate_labelled}, "seconds": {part: seconds}}`; `run` and `seconds` may be absent.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple


class Row(NamedTuple):
    """One measurement; `value`, `low`, `high`, `chance` are shares of 1. `part` heads a group of rows."""

    part: str
    task: str
    value: float
    low: float
    high: float
    chance: float | None


PROBES = {
    "model": "linear probe",
    "random": "  the same on a random tower",
    "pixels": "  the same on the pixels",
}


def result_rows(results: dict[str, Any]) -> Iterator[Row]:
    """Every measurement of a run, in reading order."""
    for found in results["sets"].values():
        yield from _pair_rows(found) if found["kind"] == "pairs" else _labelled_rows(found)


def _pair_rows(found: dict[str, Any]) -> Iterator[Row]:
    part = f"{found['name']}: {found['samples']:,} pairs, {found['captions']:,} captions"
    for direction, title in (("image_to_text", "image to text"), ("text_to_image", "text to image")):
        for name, entry in found["retrieval"][direction].items():
            yield _row(part, f"{title}, {name}", entry)
    for name, entry in found["zeroshot"].items():
        yield _row(part, f"zero-shot, top-{name[3:]}", entry)


def _labelled_rows(found: dict[str, Any]) -> Iterator[Row]:
    inverted = ", inverted" if found["invert"] else ""
    part = f"{found['name']}: {found['samples']:,} images, {found['classes']:,} classes{inverted}"
    zeroshot = found.get("zeroshot", {})
    for name, title in (("top1", "top-1"), ("top5", "top-5"), ("mean_per_class", "mean per class")):
        if name in zeroshot:
            yield _row(part, f"zero-shot, {title}", zeroshot[name])
    for name, title in PROBES.items():
        probe = found.get("probe", {}).get(name)
        if probe and "top1" in probe:
            yield _row(part, f"{title}, top-1", probe["top1"])


def format_results_table(results: dict[str, Any]) -> str:
    """The results as a plain-text table, in percent with 95 % intervals, and the seconds of each part."""
    lines = []
    part = None
    for row in result_rows(results):
        if row.part != part:
            lines += ["", f"{row.part:<59}  95 % interval  chance"]
            part = row.part
        chance = "" if row.chance is None else f"{100 * row.chance:6.2f}"
        lines.append(f"  {row.task:<50}{100 * row.value:6.1f}%  {100 * row.low:5.1f} … {100 * row.high:5.1f}  {chance}")
    seconds = results.get("seconds", {})
    if seconds:
        lines += ["", "seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())]
    return "\n".join(lines).strip("\n")


def _row(part: str, task: str, entry: dict[str, float]) -> Row:
    return Row(part, task, entry["value"], entry["low"], entry["high"], entry.get("chance"))

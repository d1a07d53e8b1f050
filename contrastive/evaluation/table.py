"""The results of a run as rows: the text table at its end, and the same rows for the report.

`results` is what `results.json` holds: `{"run": name, "sets": {name: results of evaluate_pairs or
evaluate_labelled}, "seconds": {part: seconds}}`; `run` and `seconds` may be absent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple


class Row(NamedTuple):
    """One measurement; `part` heads a group of rows. `value`, `low`, `high`, `chance`: shares of 1 if `unit` is "%"."""

    part: str
    task: str
    value: float
    low: float
    high: float
    chance: float | None
    unit: str = "%"

    def shown(self, value: float) -> str:
        """A number of this row as it is read: in percent, or as it is."""
        return f"{100 * value if self.unit == '%' else value:.1f}"


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
    yield from _retrieval_rows(part, found["retrieval"])
    for name, entry in found["zeroshot"].items():
        yield _row(part, f"zero-shot, top-{name[3:]}", entry)
    for name, title in (("model", "order of words"), ("blind", "  the same without the image")):
        if "composition" in found:
            measured = found["composition"][name]
            tie = ", all of them ties" if measured["value"] == 0 and measured["optimistic"] == 1 else ""
            yield _row(part, f"{title}, {found['composition']['pairs']:,} captions{tie}", measured)


def _retrieval_rows(part: str, found: dict[str, Any]) -> Iterator[Row]:
    for direction, title in (("image_to_text", "image to text"), ("text_to_image", "text to image")):
        for name, entry in found[direction].items():
            unit = "" if name == "median_rank" else "%"
            yield _row(part, f"{title}, {name.replace('_', ' ').replace('mrr', 'MRR')}", entry, unit)


def _labelled_rows(found: dict[str, Any]) -> Iterator[Row]:
    inverted = ", inverted" if found["invert"] else ""
    part = f"{found['name']}: {found['samples']:,} images, {found['classes']:,} classes{inverted}"
    zeroshot = found.get("zeroshot", {})
    for name, title in (("top1", "top-1"), ("top5", "top-5"), ("mean_per_class", "mean per class")):
        if name in zeroshot:
            yield _row(part, f"zero-shot, {title}", zeroshot[name])
    if "wording" in found:
        single = found["wording"]["single"]
        yield _row(part, "  the same by names alone, top-1", found["wording"]["names_only"])
        extremes = {"value": single["mean"], "low": single["low"], "high": single["high"]}
        yield _row(part, "  single templates, mean and extremes, top-1", extremes)
    yield from _error_rows(part, "zero-shot", zeroshot)
    for name, title in PROBES.items():
        probe = found.get("probe", {}).get(name)
        if probe and "top1" in probe:
            yield _row(part, f"{title}, top-1", probe["top1"])
    yield from _error_rows(part, "linear probe", found.get("probe", {}))
    yield from _few_shot_rows(part, found.get("fewshot", ()))
    if found.get("knn"):
        yield _row(part, f"{found['knn']['k']} nearest neighbours, top-1", found["knn"]["top1"])
    if "retrieval" in found:
        yield from _retrieval_rows(part, found["retrieval"])


def _few_shot_rows(part: str, rows: Sequence[dict[str, Any]]) -> Iterator[Row]:
    """Each method at the fewest and at the most shots; the page has them all."""
    shots = {int(row["shots"]) for row in rows} - {0}  # 0: zero-shot, a task of its own
    for row in rows:
        if row["shots"] in (min(shots), max(shots)):
            plural = "s" if row["shots"] > 1 else ""
            yield _row(part, f"{row['shots']} shot{plural}, {row['method']}, top-1", row["top1"])


def _error_rows(part: str, title: str, found: dict[str, Any]) -> Iterator[Row]:
    names = {"before": "calibration error", "after": "calibration error with temperature"}
    for name, text in names.items():
        if name in found.get("calibration", {}):
            yield _row(part, f"{title}, {text}", found["calibration"][name])


def format_results_table(results: dict[str, Any]) -> str:
    """The results as a plain-text table, in percent with 95 % intervals, and the seconds of each part."""
    lines = []
    part = None
    for row in result_rows(results):
        if row.part != part:
            lines += ["", f"{row.part:<59}  95 % interval  chance"]
            part = row.part
        chance = "" if row.chance is None else f"{100 * row.chance:6.2f}"
        low, high = row.shown(row.low), row.shown(row.high)
        lines.append(f"  {row.task:<50}{row.shown(row.value):>6}{row.unit:1}  {low:>5} … {high:>5}  {chance}".rstrip())
    seconds = results.get("seconds", {})
    if seconds:
        lines += ["", "seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())]
    return "\n".join(lines).strip("\n")


def _row(part: str, task: str, entry: dict[str, float], unit: str = "%") -> Row:
    return Row(part, task, entry["value"], entry["low"], entry["high"], entry.get("chance"), unit)

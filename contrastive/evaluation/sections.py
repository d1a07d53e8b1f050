"""Sections of the page about one set: calibration, confusion, classes, few shots, neighbours, duplicates, failures."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from typing import Any

from contrastive.evaluation.figures import (
    Map,
    map_figure,
    neighbours_figure,
    reliability_diagram,
    shots_figure,
    strength_curve,
)
from contrastive.evaluation.page import details, figure, percent, section, table

JUDGED = {"zeroshot": "zero-shot", "probe": "linear probe"}
MOST_CLASSES = 25  # beyond, a matrix is not read any more: the pairs most often confused are listed


def set_sections(name: str, found: Mapping[str, Any], points: Map | None = None) -> Iterator[str]:
    """The sections of one set, from its results and the map of its images."""
    judged = {JUDGED[task]: found[task] for task in JUDGED if "confusion" in found.get(task, {})}
    yield section(f"{name}: can its probabilities be believed?", _calibration(judged), CALIBRATION_NOTE)
    if judged:
        title, result = list(judged.items())[-1]
        yield section(f"{name}: what is taken for what, {title}", _confusion(result), CONFUSION_NOTE)
        yield section(f"{name}: class by class, {title}", _classes(result["per_class"]))
    curve = found.get("probe", {}).get("model", {})
    if len(curve.get("validation_curve", ())) > 1:
        drawn = figure("Validation accuracy by strength", strength_curve(curve["validation_curve"], curve["C"]))
        yield section(f"{name}: the strength of the probe", f'<div class="curves">{drawn}</div>')
    if found.get("fewshot"):
        zeroshot = found.get("zeroshot", {}).get("top1", {}).get("value")
        yield section(f"{name}: few shots", _few_shots(found["fewshot"], zeroshot), SHOTS_NOTE)
    if found.get("knn"):
        yield section(f"{name}: nearest neighbours", _neighbours(found["knn"]), NEIGHBOURS_NOTE)
    if points is not None:
        note = f"Each point is an image, coloured by its class. {points.method[0].upper()}{points.method[1:]}."
        yield section(f"{name}: how the model places the images", f'<div class="map">{map_figure(points)}</div>', note)
    if "composition" in found:
        yield section(f"{name}: does it read the order of words?", _composition(found["composition"]), ORDER_NOTE)
    if "hubness" in found:
        yield section(f"{name}: hubs", _hubs(found["hubness"]), HUBS_NOTE)
    if "duplicates" in found:
        yield section(f"{name}: test images that the training set holds", _duplicates(found["duplicates"]))
    failures = found.get("failures", {})
    if failures:
        listed = "\n".join(f"{key}: {reason}" for key, reason in failures.items())
        yield details(f"{name}: {len(failures)} images could not be read", listed)


CALIBRATION_NOTE = (
    "Among the answers given 80 %, 80 of 100 should be right: the closer to the dotted line, the better. ECE is the "
    "mean distance from it (expected calibration error, 15 bins); the temperature was set on training images held out."
)
CONFUSION_NOTE = "Rows: the true class; columns: the answer, in the same order. Percent of the row's images."
SHOTS_NOTE = (
    "Top-1 in percent after so many training images a class; below it, where it falls over the draws of these images "
    "(95 %). Strengths are chosen within the shots."
)
NEIGHBOURS_NOTE = (
    "The class that the most similar training images vote for, each with weight exp(similarity / temperature). Both "
    "settings are chosen on training images held out; the test images are used once."
)
ORDER_NOTE = (
    "The caption beside itself with two parts exchanged; chance is 50 %. Blind: the same choice without the image. If "
    "that is far from 50 %, the captions give the answer away."
)
HUBS_NOTE = (
    "How often each answer is among the ten nearest of a query. Skewness well above 1: a few answers are found by "
    "everyone."
)


def _calibration(judged: Mapping[str, Any]) -> str:
    if not judged:
        return ""
    rows = []
    for title, result in judged.items():
        errors = result["calibration"]
        after = errors.get("after")
        rows.append(
            [
                title,
                _interval(errors["before"]),
                _interval(after) if after else "–",
                f"{errors['temperature']:.2f}" if after else "–",
            ]
        )
    drawn = reliability_diagram({title: result["reliability"] for title, result in judged.items()})
    head = ("", "ECE, %", "calibrated, %", "temperature")
    return table(head, rows) + f'<div class="curves">{figure("Reliability, calibrated where possible", drawn)}</div>'


def _confusion(result: Mapping[str, Any]) -> str:
    counts, names = result["confusion"], result["names"]
    if len(names) > MOST_CLASSES:
        pairs = [
            (counts[i][j], names[i], names[j], counts[i][j] / max(sum(counts[i]), 1))
            for i in range(len(names))
            for j in range(len(names))
            if i != j and counts[i][j]
        ]
        worst = sorted(pairs, reverse=True)[:20]
        rows = [[true, given, str(count), percent(share, "", 0)] for count, true, given, share in worst]
        return table(("is", "taken for", "images", "% of the class"), rows)
    lines = []
    for index, (name, row) in enumerate(zip(names, counts, strict=True), 1):
        cells = []
        for place, count in enumerate(row, 1):
            share = count / max(sum(row), 1)
            hue = "58 154 106" if place == index else "217 130 43"
            shown = f"{100 * share:.0f}" if share >= 0.005 else ""
            title = html.escape(f"{name} taken for {names[place - 1]}: {count}", quote=True)
            cells.append(f'<td style="background:rgb({hue} / {0.9 * share**0.6:.2f})" title="{title}">{shown}</td>')
        lines.append(f"<tr><th>{html.escape(name)} <small>{index}</small></th>{''.join(cells)}</tr>")
    head = "".join(f"<th><small>{index}</small></th>" for index in range(1, len(names) + 1))
    return (
        f'<div class="scroll"><table class="confusion"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>\n"
    )


def _classes(rows: list[dict[str, Any]]) -> str:
    ordered = sorted(rows, key=lambda row: 2.0 if row["recall"] is None else row["recall"]["value"])
    cells = [
        [
            row["class"],
            f"{row['samples']:,}",
            _interval(row["recall"]) if row["recall"] else "–",
            percent(row["precision"], "", 1) or "–",
            f"{row['taken_for']} {percent(row['taken_for_share'], ' %', 0)}" if row["taken_for"] else "–",
        ]
        for row in ordered
    ]
    return table(("worst first", "images", "recall, %", "precision, %", "most often taken for"), cells, "classes")


def _few_shots(rows: list[dict[str, Any]], zeroshot: float | None) -> str:
    """A table of methods by shots, the value above its interval, and the same as a figure."""
    rows = [row for row in rows if row["shots"]]  # what needs none is a section of its own, here the dotted line
    shots = sorted({int(row["shots"]) for row in rows})
    cell = {(str(row["method"]), int(row["shots"])): row["top1"] for row in rows}
    lines = []
    for method in dict.fromkeys(str(row["method"]) for row in rows):
        cells = "".join(_stacked(cell.get((method, count))) for count in shots)
        lines.append(f"<tr><td>{html.escape(method)}</td>{cells}</tr>")
    head = "".join(f"<th>{count} shot{'s' if count > 1 else ''}</th>" for count in shots)
    body = f"<thead><tr><th></th>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"
    drawn = figure("Top-1 by shots", shots_figure(rows, zeroshot))
    return f'<div class="scroll"><table class="shots">{body}</table></div>\n<div class="curves">{drawn}</div>'


def _stacked(entry: Mapping[str, float] | None) -> str:
    if entry is None:
        return "<td>–</td>"
    interval = f"{100 * entry['low']:.1f} – {100 * entry['high']:.1f}"
    return f"<td>{100 * entry['value']:.1f}<small>{interval}</small></td>"


def _neighbours(found: Mapping[str, Any]) -> str:
    """What was chosen and what it gives; the validation accuracies that it was chosen by, where they are there.

    found: as `knn_sweep` gives it.
    """
    head = ("neighbours", "temperature", "top-1, %")
    text = table(head, [[f"{found['k']}", f"{found['temperature']:g}", _interval(found["top1"])]])
    tried = found["grid"]
    if len(tried) > 1:
        drawn = figure("Validation accuracy by neighbours and temperature", neighbours_figure(tried))
        text += f'<div class="curves">{drawn}</div>'
    return text


def _composition(found: Mapping[str, Any]) -> str:
    rows = [[name, f"{found['pairs']:,}", _interval(found[name])] for name in ("model", "blind")]
    return table(("", "captions", "right, %"), rows)


def _hubs(found: Mapping[str, Any]) -> str:
    rows = [
        [
            direction.replace("_", " "),
            f"{one['skewness']:.2f}",
            percent(one["largest"], " %", 1),
            percent(one["never"], " %", 1),
        ]
        for direction, one in found.items()
    ]
    return table(("", "skewness", "largest hub", "never found"), rows)


def _duplicates(found: Mapping[str, Any]) -> str:
    look, place = found["look"], found["embedding"]
    rows = [
        [f"look: at most {look['distance']} of 256 bits of the hash differ", f"{look['images']:,}"],
        [f"embedding: cosine of at least {place['cosine']}", f"{place['images']:,}"],
        ["both", f"{found['both']:,}"],
    ]
    text = table(("found by", "images"), rows)
    without = [[JUDGED.get(task, task), _interval(entry)] for task, entry in found["without"].items()]
    text += table((f"top-1 on the {found['fresh']:,} images that neither finds", "%"), without)
    listed = "\n".join(f"{a}  ~  {b}   {bits} bits, cosine {cosine:.4f}" for a, b, bits, cosine in found["pairs"])
    return text + details("The nearest pairs: test image ~ training image", listed)


def _interval(entry: Mapping[str, float]) -> str:
    return f"{100 * entry['value']:.1f}  ({100 * entry['low']:.1f} – {100 * entry['high']:.1f})"

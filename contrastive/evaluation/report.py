"""`report.html`: of a pretraining run, and of an evaluation; both have the same sections for the same results."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from contrastive.evaluation.compare import scale_of
from contrastive.evaluation.examples import Case, Examples, Hits
from contrastive.evaluation.figures import Map, training_curves
from contrastive.evaluation.page import details, figure, percent, picture, section, table, write_page
from contrastive.evaluation.sections import JUDGED, set_sections
from contrastive.evaluation.table import Row, result_rows


def write_report(
    path: str | Path,
    *,
    results: dict[str, Any],
    metrics: Sequence[dict[str, Any]] = (),
    examples: Mapping[str, Examples] | None = None,
    maps: Mapping[str, Map | None] | None = None,
    config: str = "",
    environment: dict[str, Any] | None = None,
) -> Path:
    """Write the report to `path` (under a temporary name first) and return it.

    Args:
        results: see `contrastive.evaluation.table`; `run` is the title, `warnings` are lines that stand above all
            numbers, `comparison` is that of `compare_samples` by set.  metrics: rows of `metrics.jsonl`.
        examples, maps: by the name of the set, from `evaluate_pairs(…, examples=n)` and `evaluate_labelled`.
        config: the resolved recipe, or what the evaluation was asked for, as text.  environment: versions and hardware.
    """
    rows = list(result_rows(results))
    warned = "".join(f"<li>{html.escape(line)}</li>" for line in results.get("warnings", ()))
    sections = [
        f'<ul class="warnings">{warned}</ul>' if warned else "",
        _key_numbers(rows, results),
        _section_of_comparison(results),
        section("Results", _table(rows) + _seconds(results.get("seconds", {}))),
        section("Training", _curves(metrics)),
    ]
    for name, found in results["sets"].items():
        shown = (examples or {}).get(name, Examples())
        worst_note = f"{WORST_NOTE} Task: {JUDGED.get(shown.worst_of, shown.worst_of)}."
        judged = JUDGED.get(shown.worst_of, "zero-shot")
        sections += [
            *set_sections(name, found, (maps or {}).get(name)),
            section(f"{name}: most wrong", _cases(shown.worst), worst_note),
            section(f"{name}: what a caption finds", _hits(shown.hits), HITS_NOTE),
            section(f"{name}: {judged}, right", _cases(shown.right), CASES_NOTE),
            section(f"{name}: {judged}, wrong", _cases(shown.wrong), CASES_NOTE),
        ]
    sections += [
        details("Recipe" if metrics else "Configuration", config),
        details("Environment", json.dumps(environment, indent=2) if environment else ""),
    ]
    return write_page(path, str(results.get("run", "contrastive")), sections)


WORST_NOTE = "Wrong answers whose true class was found least probable: look for wrong labels and odd images first."
HITS_NOTE = (
    "For captions drawn at random, the eight images whose embeddings are nearest, best first; under each "
    "image its own caption. A solid frame: the caption is the image's own."
)
CASES_NOTE = "Drawn at random. The three likeliest captions with their probabilities."


def _section_of_comparison(results: Mapping[str, Any]) -> str:
    """A table of two models for each set."""
    text = ""
    for name, found in results.get("comparison", {}).items():
        rows = []
        for measure, row in found["measures"].items():
            change = row["difference"]
            p = row["mcnemar"]["p"] if "mcnemar" in row else change["p"]
            unit, digits = scale_of(measure)
            a, b, value, low, high = (
                f"{unit * x:{sign}.{digits}f}"
                for x, sign in ((row["a"], ""), (row["b"], ""), *((change[k], "+") for k in ("value", "low", "high")))
            )
            rows.append([measure, a, b, f"{value}  ({low} – {high})", f"{p:.2g}"])
        note = (
            f"a = {found['a']}, b = {found['b']}; 95 % intervals of paired resamples; p: McNemar's exact test where an "
        )
        note += "answer is right or wrong, else the bootstrap's."
        text += section(f"{name}: two models", table(("", "a", "b", "b − a", "p"), rows), note)
    return text


def _key_numbers(rows: list[Row], results: dict[str, Any]) -> str:
    wanted = ("zero-shot, top-1", "linear probe, top-1", "image to text, recall@5")
    cards = [
        f"<li><strong>{100 * row.value:.1f} %</strong><span>{html.escape(row.task)}</span>"
        f"<small>{html.escape(row.part)}; chance {percent(row.chance)}</small></li>"
        for task in wanted
        for row in rows
        if row.task == task
    ]
    training = results.get("seconds", {}).get("training")
    if training:
        cards.append(f"<li><strong>{training / 60:.1f} min</strong><span>of training</span><small></small></li>")
    return f'<ul class="cards">{"".join(cards)}</ul>' if cards else ""


def _table(rows: list[Row]) -> str:
    lines, part = [], None
    for row in rows:
        if row.part != part:
            part = row.part
            lines.append(f'<tr><th colspan="4" scope="rowgroup">{html.escape(part)}</th></tr>')
        lines.append(
            f"<tr><td>{html.escape(row.task)}</td><td>{row.shown(row.value)}</td>"
            f"<td>{row.shown(row.low)} – {row.shown(row.high)}</td><td>{percent(row.chance, '')}</td></tr>"
        )
    head = "<tr><th></th><th>%</th><th>95 % interval</th><th>chance</th></tr>"
    return f"<table><thead>{head}</thead><tbody>{''.join(lines)}</tbody></table>\n" if lines else ""


def _seconds(seconds: dict[str, float]) -> str:
    parts = ", ".join(f"{html.escape(name)} {value:.0f} s" for name, value in seconds.items())
    return f'<p class="note">Time: {parts}.</p>\n' if parts else ""


def _curves(metrics: Sequence[dict[str, Any]]) -> str:
    figures = "".join(figure(title, svg) for title, svg in training_curves(metrics).items())
    return f'<div class="curves">{figures}</div>' if figures else ""


def _hits(hits: Iterable[Hits]) -> str:
    blocks = []
    for hit in hits:
        tiles = "".join(
            f"<li{' class=right' if right else ''}>{picture(image, own)}<span>{html.escape(own)}</span></li>"
            for image, own, right in hit.images
        )
        blocks.append(f'<h3>“{html.escape(hit.caption)}”</h3><ul class="tiles">{tiles}</ul>')
    return "\n".join(blocks)


def _cases(cases: Iterable[Case]) -> str:
    blocks = []
    for case in cases:
        guesses = "".join(
            f'<li{" class=right" if name == case.truth else ""}><meter value="{chance:.3f}"></meter> '
            f"{100 * chance:.{0 if chance >= 0.1 else 1}f} % {html.escape(name)}</li>"
            for name, chance in case.guesses
        )
        truth = html.escape(case.truth)
        blocks.append(f"<li>{picture(case.image, case.truth)}<div><b>{truth}</b><ol>{guesses}</ol></div></li>")
    return f'<ul class="cases">{"".join(blocks)}</ul>' if blocks else ""

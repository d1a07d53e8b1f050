"""`report.html` of a run: one file without outside references, to read on a desk or a phone."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from PIL import Image

from contrastive.evaluation.figures import training_curves
from contrastive.evaluation.table import Row, result_rows
from contrastive.evaluation.tasks import Case, Examples, Hits


def write_report(
    path: str | Path,
    *,
    results: dict[str, Any],
    metrics: Sequence[dict[str, Any]] = (),
    examples: Mapping[str, Examples] | None = None,
    config: str = "",
    environment: dict[str, Any] | None = None,
) -> Path:
    """Write the report to `path` (under a temporary name first) and return it.

    Args:
        results: see `contrastive.evaluation.table`; `run` is the title.  metrics: rows of `metrics.jsonl`.
        examples: by the name of the set, from `evaluate_pairs(…, examples=n)` and `evaluate_labelled`.
        config: the resolved recipe as text.  environment: versions and hardware.
    """
    rows = list(result_rows(results))
    sections = [
        _key_numbers(rows, results),
        _section("Results", _table(rows) + _seconds(results.get("seconds", {}))),
        _section("Training", _curves(metrics)),
    ]
    for name, shown in (examples or {}).items():
        sections += [
            _section(f"{name}: what a caption finds", _hits(shown.hits), HITS_NOTE),
            _section(f"{name}: zero-shot, right", _cases(shown.right), CASES_NOTE),
            _section(f"{name}: zero-shot, wrong", _cases(shown.wrong), CASES_NOTE),
        ]
    sections += [
        _details("Recipe", config),
        _details("Environment", json.dumps(environment, indent=2) if environment else ""),
    ]
    style = files("contrastive.evaluation").joinpath("report.css").read_text(encoding="utf-8")
    title = html.escape(str(results.get("run", "contrastive")))
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>\n{style}</style></head>\n<body><main>\n<h1>{title}</h1>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main></body></html>\n"
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(page, encoding="utf-8")
    unfinished.replace(path)
    return path


HITS_NOTE = (
    "For captions drawn at random, the eight images whose embeddings are nearest, best first; under each "
    "image its own caption. A solid frame: the caption is the image's own."
)
CASES_NOTE = "Drawn at random. The three likeliest captions with their probabilities."


def _section(title: str, body: str, note: str = "") -> str:
    note = f'<p class="note">{html.escape(note)}</p>\n' if note else ""
    return f"<section><h2>{html.escape(title)}</h2>\n{note}{body}</section>" if body else ""


def _key_numbers(rows: list[Row], results: dict[str, Any]) -> str:
    wanted = ("zero-shot, top-1", "linear probe, top-1", "image to text, recall@5")
    cards = [
        f"<li><strong>{100 * row.value:.1f} %</strong><span>{html.escape(row.task)}</span>"
        f"<small>{html.escape(row.part)}; chance {_percent(row.chance)}</small></li>"
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
            f"<tr><td>{html.escape(row.task)}</td><td>{100 * row.value:.1f}</td>"
            f"<td>{100 * row.low:.1f} – {100 * row.high:.1f}</td><td>{_percent(row.chance, '')}</td></tr>"
        )
    head = "<tr><th></th><th>%</th><th>95 % interval</th><th>chance</th></tr>"
    return f"<table><thead>{head}</thead><tbody>{''.join(lines)}</tbody></table>\n" if lines else ""


def _seconds(seconds: dict[str, float]) -> str:
    parts = ", ".join(f"{html.escape(name)} {value:.0f} s" for name, value in seconds.items())
    return f'<p class="note">Time: {parts}.</p>\n' if parts else ""


def _curves(metrics: Sequence[dict[str, Any]]) -> str:
    figures = "".join(
        f"<figure><figcaption>{html.escape(title)}</figcaption>{svg}</figure>"
        for title, svg in training_curves(metrics).items()
    )
    return f'<div class="curves">{figures}</div>' if figures else ""


def _hits(hits: Iterable[Hits]) -> str:
    blocks = []
    for hit in hits:
        tiles = "".join(
            f"<li{' class=right' if right else ''}>{_image(image, own)}<span>{html.escape(own)}</span></li>"
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
        blocks.append(f"<li>{_image(case.image, case.truth)}<div><b>{truth}</b><ol>{guesses}</ol></div></li>")
    return f'<ul class="cases">{"".join(blocks)}</ul>' if blocks else ""


def _details(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary><pre>{html.escape(text)}</pre></details>" if text else ""


def _image(image: Image.Image, alt: str) -> str:
    data = io.BytesIO()
    image.save(data, format="PNG", optimize=True)
    encoded = base64.b64encode(data.getvalue()).decode()
    return f'<img src="data:image/png;base64,{encoded}" alt="{html.escape(alt, quote=True)}">'


def _percent(share: float | None, unit: str = " %") -> str:
    return "" if share is None else f"{100 * share:.2f}{unit}"

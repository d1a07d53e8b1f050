"""The training curves of a run as an SVG picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

INK = "#7a8088"  # reads on a light and on a dark page
COLOURS = ("#3b7dd8", "#d9822b", "#3a9a6a", "#b4529a")

SHARES = ("Validation recall@1", "Validation zero-shot", "Share of time waiting for data")


def training_curves(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Title -> SVG text, one small figure each, of those quantities that the rows hold.

    rows: of `metrics.jsonl`, each with `step` and any of `train/loss`, `train/lr_factor`,
    `train/pairs_per_second`, `train/data_wait`, `validation/…`.
    """
    panels = {
        "Training loss": {"train/loss": "loss"},
        "Validation recall@1": {
            "validation/image_to_text/recall@1": "image to text",
            "validation/text_to_image/recall@1": "text to image",
        },
        "Validation zero-shot": {"validation/zeroshot/top1": "top-1", "validation/zeroshot/top5": "top-5"},
        "Learning rate, share of the peak": {"train/lr_factor": "learning rate"},
        "Pairs per second": {"train/pairs_per_second": "pairs per second"},
        "Share of time waiting for data": {"train/data_wait": "data wait"},
    }
    figures = {}
    for title, series in panels.items():
        curves = {label: points(rows, key) for key, label in series.items()}
        curves = {label: curve for label, curve in curves.items() if curve[0]}
        if curves:
            figures[title] = _draw(curves, percent=title in SHARES)
    return figures


def points(rows: Sequence[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of one quantity; rows that lack it, or hold null, are left out."""
    held = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return [step for step, _ in held], [value for _, value in held]


def _draw(curves: dict[str, tuple[list[float], list[float]]], percent: bool) -> str:
    figure = Figure(figsize=(4.4, 2.5), layout="constrained")
    axes: Axes = figure.add_subplot()
    for (label, (x, y)), colour in zip(curves.items(), COLOURS, strict=False):
        axes.plot(x, y, label=label, color=colour, linewidth=1.6, marker="o" if len(x) < 15 else None, markersize=3)
    if len(curves) > 1:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    axes.set_xlabel("step", color=INK, fontsize=9)
    values = [value for _, y in curves.values() for value in y]
    axes.set_ylim(min(0.0, 1.05 * min(values)), 1.05 * max(values) or None)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.tick_params(colors=INK, labelsize=9)
    axes.grid(color=INK, alpha=0.2)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "contrastive"}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]

"""The pictures of a report, as SVG: training curves, reliability, the map of embeddings."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter

INK = "#7a8088"  # reads on a light and on a dark page
COLOURS = ("#3b7dd8", "#d9822b", "#3a9a6a", "#b4529a", "#c0504d", "#2f9fa8")

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


def strength_curve(curve: Sequence[Sequence[float]], chosen: float) -> str:
    """Validation accuracy of each strength that was tried, `(C, accuracy)`, as SVG text; a ring on the chosen one."""
    with _axes("C, the inverse of the penalty", (4.4, 2.6)) as (axes, done):
        x, y = zip(*sorted((float(c), float(accuracy)) for c, accuracy in curve), strict=True)
        axes.semilogx(x, y, color=COLOURS[0], marker="o", markersize=3, linewidth=1.4)
        best = dict(zip(x, y, strict=True)).get(float(chosen))
        if best is not None:
            axes.plot([chosen], [best], "o", markersize=9, markerfacecolor="none", markeredgecolor=COLOURS[1])
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    return done[0]


def reliability_diagram(tasks: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Accuracy over confidence, a line a task, as SVG text; on the diagonal a probability means what it says.

    tasks: name -> bins `{"confidence", "accuracy", "samples"}`; a dot's area grows with the bin's samples.
    """
    with _axes("probability of the answer", (4.4, 3.4)) as (axes, done):
        axes.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle=":")
        for (label, bins), colour in zip(tasks.items(), COLOURS, strict=False):
            x, y = [row["confidence"] for row in bins], [row["accuracy"] for row in bins]
            most = max(row["samples"] for row in bins)
            axes.plot(x, y, color=colour, linewidth=1.4, label=label)
            axes.scatter(x, y, s=[8 + 60 * row["samples"] / most for row in bins], color=colour, alpha=0.6)
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)
        axes.set_ylabel("share that is right", color=INK, fontsize=9)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlim(0, 1.02)
        axes.set_ylim(0, 1.02)
    return done[0]


def shots_figure(rows: Sequence[Mapping[str, Any]], zeroshot: float | None = None) -> str:
    """Top-1 over the number of shots, a line a method with the band of its interval, as SVG text.

    rows: as `few_shot` gives them. zeroshot: the accuracy without any shot, a dotted line.
    """
    with _axes("training images a class", (4.4, 3.2)) as (axes, done):
        methods = list(dict.fromkeys(str(row["method"]) for row in rows))
        for method, colour in zip(methods, cycle(COLOURS)):
            own = sorted((row for row in rows if row["method"] == method), key=lambda row: int(row["shots"]))
            x = [int(row["shots"]) for row in own]
            value, low, high = ([float(row["top1"][name]) for row in own] for name in ("value", "low", "high"))
            axes.plot(x, value, color=colour, marker="o", markersize=3, linewidth=1.4, label=method)
            axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        if zeroshot is not None:
            axes.axhline(zeroshot, color=INK, linewidth=1, linestyle=":", label="zero-shot")
        shots = sorted({int(row["shots"]) for row in rows})
        axes.set_xscale("log", base=2)
        axes.set_xticks(shots, [str(count) for count in shots])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    return done[0]


def neighbours_figure(rows: Sequence[Mapping[str, float]]) -> str:
    """Validation accuracy over the number of neighbours, a line a temperature, as SVG text.

    rows: `{"k", "temperature", "accuracy"}` of all that were tried.
    """
    with _axes("neighbours", (4.4, 3.2)) as (axes, done):
        temperatures = sorted({float(row["temperature"]) for row in rows})
        for temperature, colour in zip(temperatures, cycle(COLOURS)):
            own = sorted((int(r["k"]), float(r["accuracy"])) for r in rows if float(r["temperature"]) == temperature)
            x, y = zip(*own, strict=True)
            label = f"temperature {temperature:g}"
            axes.semilogx(x, y, color=colour, marker="o", markersize=3, linewidth=1.4, label=label)
        ticks = sorted({int(row["k"]) for row in rows})
        axes.set_xticks(ticks, [str(count) for count in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    return done[0]


@dataclass(frozen=True)
class Map:
    """Images as points: xy float (M, 2), their classes int (M,), the names of the classes, and how it was made."""

    xy: NDArray[np.float64]
    classes: NDArray[np.int64]
    names: list[str]
    method: str


def embedding_map(
    rows_ND: NDArray[np.float32], target_N: NDArray[np.int64], names: Sequence[str], *, most: int = 1500, seed: int = 0
) -> Map:
    """A plane in which images lie near that the model places near: UMAP where `umap-learn` is installed, else the first
    two principal components. At most `most` images, drawn at random.
    """
    rows = np.random.default_rng(seed).permutation(len(rows_ND))[:most]
    chosen = np.asarray(rows_ND[np.sort(rows)], np.float64)
    try:
        from umap import UMAP
    except ImportError:
        centred = chosen - chosen.mean(axis=0)
        power, basis = np.linalg.eigh(centred.T @ centred)
        xy = np.zeros((len(chosen), 2))
        xy[:, : min(2, basis.shape[1])] = centred @ basis[:, ::-1][:, :2]
        share = power[::-1][:2].sum() / max(power.sum(), 1e-12)
        method = f"the first two principal components, which hold {share:.0%} of the variance"
    else:
        xy = UMAP(random_state=seed).fit_transform(chosen)
        method = "UMAP"
    return Map(xy, target_N[np.sort(rows)], list(names), method)


def map_figure(found: Map) -> str:
    """The map as SVG text: a point an image, a colour a class, and each class's name at its middle (up to 30)."""
    with _axes("", (6.4, 5.2)) as (axes, done):
        colours = matplotlib.colormaps["hsv"](np.linspace(0, 1, len(found.names), endpoint=False))[:, :3] * 0.82
        for index in range(len(found.names)):
            own = found.xy[found.classes == index]
            axes.plot(own[:, 0], own[:, 1], ".", markersize=3.5, alpha=0.55, color=colours[index], markeredgewidth=0)
        for index, name in enumerate(found.names if len(found.names) <= 30 else ()):
            own = found.xy[found.classes == index]
            if len(own):
                x, y = np.median(own, axis=0)
                box = {"facecolor": colours[index], "edgecolor": "none", "alpha": 0.85, "boxstyle": "round,pad=0.25"}
                axes.text(x, y, name, ha="center", va="center", fontsize=9, color="white", bbox=box)
        axes.set_axis_off()
    return done[0]


def _draw(curves: dict[str, tuple[list[float], list[float]]], percent: bool) -> str:
    with _axes("step", (4.4, 2.5)) as (axes, done):
        for (label, (x, y)), colour in zip(curves.items(), COLOURS, strict=False):
            marker = "o" if len(x) < 15 else None
            axes.plot(x, y, label=label, color=colour, linewidth=1.6, marker=marker, markersize=3)
        if len(curves) > 1:
            axes.legend(frameon=False, fontsize=9, labelcolor=INK)
        values = [value for _, y in curves.values() for value in y]
        axes.set_ylim(min(0.0, 1.05 * min(values)), 1.05 * max(values) or None)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        if percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    return done[0]


@contextmanager
def _axes(x_label: str, size: tuple[float, float]) -> Iterator[tuple[Axes, list[str]]]:
    """Axes in the page's manner; the list gets their SVG text when the block ends."""
    figure = Figure(figsize=size, layout="constrained")
    axes: Axes = figure.add_subplot()
    done: list[str] = []
    yield axes, done
    axes.set_xlabel(x_label, color=INK, fontsize=9)
    axes.tick_params(colors=INK, which="both", labelsize=9)
    axes.grid(color=INK, alpha=0.2)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "contrastive"}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    done.append(svg[svg.index("<svg") :])

"""The linear probe's sweeps beside scikit-learn's: same features, same strengths, same gap to the optimum.

    python benchmarks/probe.py                                    prints tables, writes benchmarks/results/probe.json
    python benchmarks/probe.py --sets fashion --sweeps dinov2     one row; the file keeps the others

Sets: the 10,000 training images of data/fashion-mnist as 1,280 random ReLU features of their pixels (nobody trained
them: they cost no tower and are as ill-conditioned as a tower's), and 100 made classes of 5,000 samples, 512 wide.
Sweeps: `clip`, 96 strengths from 1e-6 to 1e6, and `dinov2`, 45 from 1e-6 to 1e5; all of ours.

scikit-learn (lbfgs) fits one strength in `--every`, the first and the last among them; what the others take is
interpolated. Its rows:

"default": its own tol 1e-4 and 100 iterations, from zero: as the scripts of OpenAI's and DINOv2's protocols start.
"same gap": from zero, until the iteration that is as near the optimum as ours (or within 1e-6), which is the loosest
tolerance there is: a callback reads the objective and ends the fit. In float32, or float64 where float32 stops short.
"warm": the same from the optimum of the strength before, which it is given for nothing.

A gap is (objective - optimum) / optimum in float64; the optimum is ours at tolerance 1e-7 of the bound. `--limit`
seconds end a fit of scikit-learn's that does not get there; then its time is a lower bound, and so is the ratio.
The two take turns set by set. Keep the machine idle otherwise.
"""

import argparse
import json
import os
import platform
import sys
import time
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow.parquet as pq
import scipy.optimize
import sklearn
import torch
from numpy.typing import NDArray
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression

from contrastive.evaluation.probe import PRESETS
from contrastive.evaluation.softmax import SoftmaxRegression, Solutions

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results" / "probe.json"
scipy_minimize = scipy.optimize.minimize
PLAIN = 300  # iterations of L-BFGS without a preconditioner, at most
KINDS = ("default", "same", "warm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=12, help="fit one strength in n with scikit-learn")
    parser.add_argument("--limit", type=float, default=30, help="seconds for one fit of scikit-learn's")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="of ours: a bound of the gap")
    parser.add_argument("--samples", type=int, default=0, help="of each set, fewer for a trial; 0: all")
    parser.add_argument("--sets", nargs="+", default=["fashion", "hundred"])
    parser.add_argument("--sweeps", nargs="+", default=["clip", "dinov2"])
    parser.add_argument("--output", default=str(RESULTS))
    arguments = parser.parse_args()
    makers = {"fashion": fashion, "hundred": hundred}
    document: dict[str, Any] = vars(arguments) | {
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "scikit-learn": sklearn.__version__,
        "torch": torch.__version__,
        "rows": [],
    }
    output = Path(arguments.output)
    kept = json.loads(output.read_text())["rows"] if output.exists() else []
    for name in arguments.sets:
        features, target = makers[name]()
        if arguments.samples:
            features, target = features[: arguments.samples], target[: arguments.samples]
        for sweep in arguments.sweeps:
            row = {"set": name, "sweep": sweep} | compare(features, target, PRESETS[sweep], arguments)
            kept = [one for one in kept if (one["set"], one["sweep"]) != (name, sweep)]
            kept.append(row | {key: document[key] for key in ("every", "limit", "tolerance", "load")})
            print(line(row), flush=True)
            output.write_text(json.dumps(document | {"rows": kept}, indent=1) + "\n")


def compare(
    features: NDArray[np.float32], target: NDArray[np.int64], strengths: tuple[float, ...], arguments: Any
) -> dict[str, Any]:
    classes = int(target.max()) + 1
    rate = gemm_rate(features, classes)
    started = time.perf_counter()
    problem = SoftmaxRegression(features, target, classes)
    set_up = time.perf_counter() - started
    ours = solve(problem, strengths, arguments.tolerance)
    seconds = time.perf_counter() - started
    fits = max(2, len(strengths) // arguments.every)
    chosen = np.unique(np.linspace(0, len(strengths) - 1, fits).round().astype(int)).tolist()  # both ends among them
    near = sorted({q for p in chosen for q in (p, max(p - 1, 0))})  # and what "warm" starts from
    exact = solve(problem, [strengths[p] for p in near], 1e-7, polish=True, max_iter=3000)
    some = [strengths[p] for p in chosen]
    plain = solve(problem, some, arguments.tolerance, precondition=False, max_iter=PLAIN)
    few = solve(problem, some, arguments.tolerance)
    entries = []
    for place, p in enumerate(chosen):
        optimum, before = float(exact.objective_P[near.index(p)]), near.index(max(p - 1, 0))
        entry: dict[str, Any] = {"C": strengths[p], "gap": float(ours.objective_P[p]) / optimum - 1}
        entry["iterations"] = {"with": int(few.iterations_P[place]), "without": int(plain.iterations_P[place])}
        entry["default"] = fit(features, target, strengths[p], optimum, None)
        goal, start = max(entry["gap"], 1e-6), (exact.coef_PKD[before], exact.intercept_PK[before])
        entry["same"] = reach(features, target, strengths[p], optimum, goal, arguments.limit)
        entry["warm"] = entry["same"] if p == 0 else reach(
            features, target, strengths[p], optimum, goal, arguments.limit, start
        )  # fmt: skip
        entries.append(entry)
        print({"C": strengths[p], **{kind: entry[kind] for kind in KINDS}}, file=sys.stderr, flush=True)

    def whole(kind: str) -> float:
        return float(np.interp(range(len(strengths)), chosen, [entry[kind]["seconds"] for entry in entries]).sum())

    theirs = {kind: whole(kind) for kind in KINDS}
    return {
        "samples": len(features),
        "width": features.shape[1],
        "classes": classes,
        "strengths": len(strengths),
        "seconds": seconds,
        "of_which_set_up": set_up,
        "gemm_share": ours.flops / (seconds - set_up) / rate,
        "gemm_gflops": rate / 1e9,
        **{f"{kind}_seconds": theirs[kind] for kind in KINDS},
        **{f"{kind}_ratio": theirs[kind] / seconds for kind in KINDS},
        **{f"{kind}_is_a_lower_bound": not all(entry[kind]["reached"] for entry in entries) for kind in KINDS[1:]},
        "largest_gap": max(entry["gap"] for entry in entries),
        "default_largest_gap": max(entry["default"]["gap"] for entry in entries),
        "iterations_with": sum(entry["iterations"]["with"] for entry in entries),
        "iterations_without": sum(entry["iterations"]["without"] for entry in entries),
        "without_cut_off": sum(entry["iterations"]["without"] >= PLAIN for entry in entries),
        "fitted": entries,
    }


def solve(problem: SoftmaxRegression, strengths: Any, tolerance: float, polish: bool = False, **rest: Any) -> Solutions:
    found = problem.solve(strengths, tolerance=tolerance, polish=polish, **rest)
    assert isinstance(found, Solutions)
    return found


def reach(
    features: NDArray[np.float32],
    target: NDArray[np.int64],
    strength: float,
    optimum: float,
    gap: float,
    limit: float,
    start: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None,
) -> dict[str, Any]:
    """A fit of scikit-learn's until it is within `gap` of the optimum."""
    found = fit(features, target, strength, optimum, gap, limit, start)
    if found["reached"] or found["seconds"] >= limit:
        return found
    # in float32 its line search gives up short of the optimum, at any tolerance
    return fit(features.astype(np.float64), target, strength, optimum, gap, limit, start)


def fit(
    features: NDArray[np.floating],
    target: NDArray[np.int64],
    strength: float,
    optimum: float,
    gap: float | None,
    limit: float = np.inf,
    start: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None,
) -> dict[str, Any]:
    """Seconds, iterations and the gap reached; with `gap` None as scikit-learn's defaults have it."""
    rest = {} if gap is None else {"tol": 1e-14, "max_iter": 1_000_000}
    estimator = LogisticRegression(C=strength, warm_start=start is not None, **rest)
    if start is not None:
        estimator.classes_ = np.unique(target)
        estimator.coef_, estimator.intercept_ = (part.astype(features.dtype) for part in start)
    scale, began = strength * len(target), time.perf_counter()

    def look(intermediate_result: Any) -> None:
        if gap is not None and intermediate_result.fun * scale <= optimum * (1 + gap):
            raise StopIteration
        if time.perf_counter() - began > limit:
            raise StopIteration

    def minimise(*arguments: Any, callback: Any = None, **options: Any) -> Any:
        return scipy_minimize(*arguments, callback=look, **options)

    with warnings.catch_warnings(), patch.object(scipy.optimize, "minimize", minimise):
        warnings.simplefilter("ignore")
        estimator.fit(features, target)
    seconds = time.perf_counter() - began
    reached = objective(estimator, features, target) / optimum - 1
    return {
        "seconds": seconds,
        "iterations": int(estimator.n_iter_[0]),
        "gap": reached,
        "reached": gap is None or reached <= gap * (1 + 1e-3),
        "precision": str(features.dtype),
    }


def objective(estimator: LogisticRegression, features: NDArray[np.floating], target: NDArray[np.int64]) -> float:
    coef = estimator.coef_.astype(np.float64)
    log_probability = log_softmax(features.astype(np.float64) @ coef.T + estimator.intercept_, axis=1)
    loss = -log_probability[np.arange(len(target)), target].sum()
    return float(estimator.C * loss + (coef**2).sum() / 2)


def gemm_rate(features: NDArray[np.float32], classes: int) -> float:
    """float32 operations a second of this machine on features times the weights of 12 strengths, the best of five."""
    left = torch.as_tensor(features)
    right = torch.randn(features.shape[1], 12 * classes)
    best = np.inf
    for _ in range(5):
        started = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - started)
    return 2.0 * left.numel() * right.shape[1] / best


def fashion() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    import io

    from PIL import Image

    table = pq.read_table(ROOT.parent / "data" / "fashion-mnist" / "train.parquet")
    images = [entry["bytes"] if isinstance(entry, dict) else entry for entry in table.column("image").to_pylist()]
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(image)).convert("L")).ravel() for image in images]) / 255
    random = np.random.default_rng(0)
    weights = random.normal(size=(pixels.shape[1], 1280)) / np.sqrt(pixels.shape[1])
    features = np.maximum((pixels - pixels.mean(axis=0)) @ weights, 0)
    return features.astype(np.float32), np.asarray(table.column("label").to_pylist(), dtype=np.int64)


def hundred() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    random = np.random.default_rng(0)
    target = np.tile(np.arange(100), 50)
    spread = np.logspace(0, -1.5, 512)  # a tower's features lose power along their directions
    features = (random.normal(size=(100, 512))[target] + 2 * random.normal(size=(len(target), 512))) * spread
    return features.astype(np.float32), target


def line(row: dict[str, Any]) -> str:
    def beside(kind: str) -> str:
        bound = "at least " if row.get(f"{kind}_is_a_lower_bound") else ""
        return f"{bound}{row[f'{kind}_seconds']:.0f} s ({bound}{row[f'{kind}_ratio']:.1f}x)"

    return (
        f"{row['set']:8} {row['sweep']:7} {row['samples']:,} x {row['width']:,}, {row['classes']} classes, "
        f"{row['strengths']} strengths: {row['seconds']:.1f} s (set-up {row['of_which_set_up']:.1f}), "
        f"gap <= {row['largest_gap']:.1e}; scikit-learn at the same gap {beside('same')}, warm {beside('warm')}, at "
        f"its default {beside('default')}, gap {row['default_largest_gap']:.1e}; iterations "
        f"{row['iterations_with']:,} with, {row['iterations_without']:,} without the preconditioner "
        f"({row['without_cut_off']} of {len(row['fitted'])} cut off there); "
        f"{100 * row['gemm_share']:.0f} % of {row['gemm_gflops']:.0f} GFLOP/s"
    )


if __name__ == "__main__":
    main()

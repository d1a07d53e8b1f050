"""The linear probe's sweeps beside scikit-learn's: same features, same strengths, same gap to the optimum.

    python benchmarks/probe.py                                    prints tables, writes benchmarks/results/probe.json
    python benchmarks/probe.py --sets fashion --sweeps dinov2     one row; the file keeps the others

Sets: the 10,000 training images of data/fashion-mnist as 1,280 random ReLU features of their pixels (nobody trained
them: they cost no tower and are as ill-conditioned as a tower's), and 100 made classes of 5,000 samples, 512 wide.
Sweeps: `clip`, 96 strengths from 1e-6 to 1e6, and `dinov2`, 45 from 1e-6 to 1e5; all of ours.

scikit-learn fits one strength after the other; of its strengths one in `--every` is fitted, the first and the last
among them, in float32 (float64 where it stops short in float32) and
starting from the one before (less near than the neighbour would be), and its time is that of
all of them, by interpolation.
"default": its own tol 1e-4 and 100 iterations. "same gap": the loosest of a ladder of tolerances with which it comes as
close to the optimum as ours, per strength (or to 1e-6); only the time of that fit counts, not the search for it. A gap
is (objective - optimum) / optimum in float64; the optimum is ours at tolerance 1e-7 of the bound. `--limit` seconds end
a fit of scikit-learn's that does not get there; then its time is a lower bound, and so is the ratio. The two take turns
set by set and, within scikit-learn, strength by strength. Keep the machine idle otherwise.
"""

import argparse
import itertools
import json
import os
import platform
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import sklearn
import torch
from numpy.typing import NDArray
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression

from contrastive.evaluation.probe import PRESETS
from contrastive.evaluation.softmax import SoftmaxRegression, Solutions

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results" / "probe.json"
PLAIN = 300  # iterations of L-BFGS without a preconditioner, at most
LADDER = tuple(10.0**-power for power in range(2, 11))  # of scikit-learn's tol


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
    exact = solve(problem, [strengths[p] for p in chosen], 1e-7, polish=True, max_iter=3000)
    plain = solve(problem, [strengths[p] for p in chosen], arguments.tolerance, precondition=False, max_iter=PLAIN)
    few = solve(problem, [strengths[p] for p in chosen], arguments.tolerance)
    entries = []
    model: dict[str, LogisticRegression] = {}
    for place, p in enumerate(chosen):
        optimum = float(exact.objective_P[place])
        entry: dict[str, Any] = {"C": strengths[p], "gap": float(ours.objective_P[p]) / optimum - 1}
        entry["iterations"] = {"with": int(few.iterations_P[place]), "without": int(plain.iterations_P[place])}
        default, _ = fit(LogisticRegression(C=strengths[p], warm_start=True), model, "default", features, target)
        entry["default"] = default | {"gap": default.pop("objective") / optimum - 1}
        # in float32 its line search may give up short of the optimum, at any tolerance: then float64
        for precision, tolerance in itertools.product((np.float32, np.float64), LADDER):
            other = LogisticRegression(C=strengths[p], tol=tolerance, max_iter=100_000, warm_start=True)
            found, done = fit(other, model, "same", features.astype(precision), target, arguments.limit)
            gap = found.pop("objective") / optimum - 1
            reached = done and gap <= max(entry["gap"], 1e-6)
            entry["same"] = found | {"tol": tolerance, "gap": gap, "reached": reached, "precision": precision.__name__}
            if reached or not done:
                break
        model["same"] = other
        entries.append(entry)
    scale = len(strengths) / len(chosen)
    theirs = {kind: scale * sum(entry[kind]["seconds"] for entry in entries) for kind in ("default", "same")}
    return {
        "samples": len(features),
        "width": features.shape[1],
        "classes": classes,
        "strengths": len(strengths),
        "seconds": seconds,
        "of_which_set_up": set_up,
        "gemm_share": ours.flops / (seconds - set_up) / rate,
        "gemm_gflops": rate / 1e9,
        "default_seconds": theirs["default"],
        "same_seconds": theirs["same"],
        "default_ratio": theirs["default"] / seconds,
        "same_ratio": theirs["same"] / seconds,
        "same_is_a_lower_bound": not all(entry["same"]["reached"] for entry in entries),
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


def fit(
    estimator: LogisticRegression,
    before: dict[str, LogisticRegression],
    kind: str,
    features: NDArray[np.float32],
    target: NDArray[np.int64],
    limit: float = np.inf,
) -> tuple[dict[str, Any], bool]:
    """Fit from where the estimator of the strength before ended, in pieces of iterations until done or out of time."""
    if kind in before:
        estimator.coef_, estimator.intercept_ = before[kind].coef_.copy(), before[kind].intercept_.copy()
    if kind == "default":
        before[kind] = estimator
    else:
        estimator.set_params(max_iter=300)
    seconds, iterations = 0.0, 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        while True:
            started = time.perf_counter()
            estimator.fit(features, target)
            seconds += time.perf_counter() - started
            iterations += int(estimator.n_iter_[0])
            done = estimator.n_iter_[0] < estimator.max_iter
            if done or kind == "default" or seconds > limit:
                break
    found = {"seconds": seconds, "iterations": iterations, "objective": objective(estimator, features, target)}
    return found, bool(done)


def objective(estimator: LogisticRegression, features: NDArray[np.float32], target: NDArray[np.int64]) -> float:
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
    bound = "at least " if row["same_is_a_lower_bound"] else ""
    return (
        f"{row['set']:8} {row['sweep']:7} {row['samples']:,} x {row['width']:,}, {row['classes']} classes, "
        f"{row['strengths']} strengths: {row['seconds']:.1f} s (set-up {row['of_which_set_up']:.1f}), "
        f"gap <= {row['largest_gap']:.1e}; scikit-learn at the same gap {bound}{row['same_seconds']:.0f} s "
        f"({bound}{row['same_ratio']:.1f}x), at its default {row['default_seconds']:.0f} s "
        f"({row['default_ratio']:.1f}x), gap {row['default_largest_gap']:.1e}; iterations "
        f"{row['iterations_with']:,} with, {row['iterations_without']:,} without the preconditioner "
        f"({row['without_cut_off']} of {len(row['fitted'])} cut off there); "
        f"{100 * row['gemm_share']:.0f} % of {row['gemm_gflops']:.0f} GFLOP/s"
    )


if __name__ == "__main__":
    main()

"""Compares the speed of this checkout with another one: runs a benchmark of both in turns and prints the ratios.

    git worktree add /tmp/before COMMIT
    python benchmarks/against.py /tmp/before -- benchmarks/making.py --once copy
    python benchmarks/against.py /tmp/before --turns 30 -- benchmarks/loader.py --once exact
    python benchmarks/against.py /tmp/before -- benchmarks/step.py --once

Every run is a process of its own, the same script of this checkout with the package of one checkout or the other
(PYTHONPATH). It prints, as its last line, a JSON object of costs: {"seconds": 1.9}. Less is better.

The turns alternate, before now, now before, before now, ..., so that a machine that becomes slower or faster during
the comparison favours neither. A first pair does not count. Each pair of neighbours gives one ratio, now / before.
Printed are both medians, the geometric mean of the ratios and its 95 % interval (Student's t of the logarithms). The
exit code is 1 where the upper end of the interval of a cost that is named with --bound is above 1 + that bound.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Ratio(NamedTuple):
    """Medians of both, and the ratio now / before with its 95 % interval."""

    before: float
    now: float
    ratio: float
    low: float
    high: float


def compare(before: Sequence[float], now: Sequence[float]) -> Ratio:
    """The ratio of paired costs: value i of both comes from the same turn. Needs two pairs."""
    from scipy.stats import t

    logs = [math.log(mine / other) for mine, other in zip(now, before, strict=True)]
    middle = statistics.fmean(logs)
    half = float(t.ppf(0.975, len(logs) - 1)) * statistics.stdev(logs) / math.sqrt(len(logs))
    ends = (math.exp(value) for value in (middle, middle - half, middle + half))
    return Ratio(statistics.median(before), statistics.median(now), *ends)


def order(turn: int) -> tuple[str, str]:
    """The checkouts of a turn, in the order in which they run."""
    return ("before", "now") if turn % 2 == 0 else ("now", "before")


def costs(checkout: Path, command: Sequence[str]) -> dict[str, float]:
    """Run the command with the package of `checkout`; the JSON object of its last line."""
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    done = subprocess.run([sys.executable, *command], env=environment, stdout=subprocess.PIPE, text=True, check=False)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        sys.exit(f"with {checkout}: {' '.join(command)} ended with exit code {done.returncode}")
    found: dict[str, float] = json.loads(lines[-1])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="the other checkout")
    parser.add_argument("--turns", type=int, default=20, help="pairs that count (default: 20)")
    parser.add_argument("--bound", type=float, help="a share, as 0.05: exit code 1 where an interval ends above it")
    parser.add_argument("command", nargs="+", metavar="-- SCRIPT", help="a benchmark of this checkout and its options")
    arguments = parser.parse_args()
    if not (arguments.before / "contrastive" / "__init__.py").is_file():
        parser.error(f"{arguments.before}: no checkout of this project")
    if arguments.turns < 2:
        parser.error(f"--turns {arguments.turns}: give at least 2")
    checkouts = {"before": arguments.before.resolve(), "now": ROOT}
    found: dict[str, list[dict[str, float]]] = {"before": [], "now": []}
    for turn in range(-1, arguments.turns):
        pair = {name: costs(checkouts[name], arguments.command) for name in order(turn)}
        if turn >= 0:
            for name, cost in pair.items():
                found[name].append(cost)
        shown = "  ".join(f"{cost} {pair['before'][cost]:.4g} -> {pair['now'][cost]:.4g}" for cost in pair["now"])
        print(f"turn {turn + 1:>3} of {arguments.turns}: {shown}", file=sys.stderr, flush=True)
    bad = False
    print(f"{'cost':<28}{'before':>12}{'now':>12}{'ratio':>9}   95 % interval, {arguments.turns} pairs")
    for cost in found["now"][0]:
        ratio = compare(*([one[cost] for one in found[name]] for name in ("before", "now")))
        bad |= arguments.bound is not None and ratio.high > 1 + arguments.bound
        low, high = (f"{100 * (end - 1):+.1f} %" for end in (ratio.low, ratio.high))
        print(f"{cost:<28}{ratio.before:>12.4g}{ratio.now:>12.4g}{ratio.ratio:>9.3f}   {low} to {high}")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())

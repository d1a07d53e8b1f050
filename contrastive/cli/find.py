"""``contrastive find``: a learning rate, and the largest chunk that fits, by short trials of a recipe."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

NAME = "find"
HELP = "find a learning rate (lr), or how many pairs fit into memory at once (batch), for a recipe"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("lr", "batch"), help="lr: a range test; batch: train.chunk and its speed")
    parser.add_argument("recipe", help="a YAML file, or the name of a shipped recipe such as pretrain/pictograms")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="changes to the recipe")
    parser.add_argument("--json", metavar="FILE", help="write all figures to this file")
    rate = parser.add_argument_group("lr")
    rate.add_argument("--from", dest="low", type=float, metavar="RATE", help="first rate (default: 1e-6)")
    rate.add_argument("--to", dest="high", type=float, metavar="RATE", help="last rate (default: 1)")
    rate.add_argument("--steps", type=int, metavar="N", help="steps between them (default: 100)")
    rate.add_argument("--plot", metavar="FILE", help="draw the loss over the rate: .png, .svg or .pdf")
    batch = parser.add_argument_group("batch")
    batch.add_argument("--memory", metavar="SIZE", help="what a process may take, such as 4GiB; needed on a CPU")
    batch.add_argument("--processes", type=int, metavar="N", help="that share train.global_batch (default: 1)")
    batch.add_argument("--seconds", type=float, metavar="S", help="each size is measured for (default: 1)")


def run(args: argparse.Namespace) -> int:
    from contrastive.cli.output import check_output
    from contrastive.config import load_config
    from contrastive.errors import UserError

    foreign = {"lr": ("memory", "processes", "seconds"), "batch": ("low", "high", "steps", "plot")}[args.what]
    for name in foreign:
        if getattr(args, name) is not None:
            option = {"low": "from", "high": "to"}.get(name, name)
            raise UserError(f"--{option} is not for `find {args.what}`; see `contrastive find --help`")
    check_output("--json", args.json)
    check_output("--plot", getattr(args, "plot", None))
    config = load_config(args.recipe, args.overrides)
    found = _find_rate(args, config) if args.what == "lr" else _find_batch(args, config)
    if args.json is not None:
        Path(args.json).write_text(json.dumps(found, indent=2) + "\n")
    return 0


def _find_rate(args: argparse.Namespace, config: Any) -> Any:
    from contrastive.errors import UserError
    from contrastive.finding import PLOTS, find_rate, plot_rates, rate_text

    if args.plot is not None and Path(args.plot).suffix not in PLOTS:
        raise UserError(f"--plot {args.plot}: give a file that ends in {', '.join(PLOTS)}")
    found = find_rate(
        config,
        low=1e-6 if args.low is None else args.low,
        high=1.0 if args.high is None else args.high,
        steps=100 if args.steps is None else args.steps,
    )
    print(rate_text(found, config.optim.lr))
    if args.plot is not None:
        plot_rates(found, Path(args.plot))
    figures = asdict(found)
    for name in ("losses", "smoothed"):  # JSON has no infinity
        figures[name] = [value if math.isfinite(value) else None for value in figures[name]]
    return figures


def _find_batch(args: argparse.Namespace, config: Any) -> Any:
    from contrastive.errors import UserError
    from contrastive.finding import find_sizes, parse_bytes, sizes_text

    processes = 1 if args.processes is None else args.processes
    if processes < 1:
        raise UserError(f"--processes {processes}: give at least 1")
    memory = None if args.memory is None else parse_bytes(args.memory)
    print(f"{'pairs':>8}  {'samples/s':>10}  {'peak memory':>12}")
    sizes = []
    for size in find_sizes(config, memory=memory, processes=processes, seconds=args.seconds or 1.0):
        sizes.append(size)
        if size.rate is None or size.peak is None:
            print(f"{size.pairs:8,d}  does not fit", flush=True)
        else:
            print(f"{size.pairs:8,d}  {size.rate:10,.0f}  {size.peak / 2**20:8,.0f} MiB", flush=True)
    print(sizes_text(config, sizes, processes))
    return [asdict(size) for size in sizes]

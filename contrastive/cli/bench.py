"""``contrastive bench``: how fast this machine feeds a model, and what holds it up."""

from __future__ import annotations

import argparse
from pathlib import Path

NAME = "bench"
HELP = "measure the loader on this machine: what is the bottleneck, how many workers are wanted"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("loader",), help="loader: shards to batches, part by part")
    parser.add_argument("source", help="a recipe (its model is measured too), or a folder, glob or URL of shards")
    parser.add_argument("--seconds", type=float, default=3.0, metavar="S", help="for each measurement (default: 3)")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    parser.add_argument("--size", type=int, default=224, metavar="PX", help="of shards without a recipe (default: 224)")
    parser.add_argument("--decode", choices=("exact", "fast"), default="exact", help="of shards without a recipe")


def run(args: argparse.Namespace) -> int:
    from contrastive.config.shipped import find_recipes
    from contrastive.errors import UserError
    from contrastive.loader_bench import Measured, bench_recipe, bench_shards

    # a name without a folder behind it is that of a recipe that comes along
    named = not Path(args.source).exists() and not any(mark in args.source for mark in "*?[{:")
    if named and args.source not in find_recipes() and not args.source.endswith((".yaml", ".yml")):
        raise UserError(f"{args.source}: no shards lie there, and `contrastive recipes list` names no such recipe")
    if named or args.source.endswith((".yaml", ".yml")):
        from contrastive.config import load_config

        found = bench_recipe(load_config(args.source, []), seconds=args.seconds, workers=args.workers)
    else:
        found = bench_shards(
            args.source, size=args.size, decode=args.decode, seconds=args.seconds, workers=args.workers
        )
    for line in found:
        if isinstance(line, Measured):
            print(f"  {line.name:34} {line.rate:10,.0f} samples a second", flush=True)
        else:
            print(line.text)
    return 0

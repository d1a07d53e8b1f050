"""``contrastive selfcheck``: what the documentation promises, measured on this machine."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from contrastive.selfcheck import Result

NAME = "selfcheck"
FAILED = 1
HELP = "check on this machine that the losses give the gradient that they claim"
COLUMNS = ("processes", "tile", "exchange", "chunks", "precision")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("losses",), help="losses: the gradient of every way, against plain float64")
    parser.add_argument("--loss", action="append", metavar="NAME", help="only this loss; may be given again")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], metavar="N", help="default: 1 2 4")
    parser.add_argument("--precision", nargs="+", metavar="P", help="float64, float32, bfloat16 (default: all)")


def run(args: argparse.Namespace) -> int:
    from contrastive.selfcheck import BOUNDS, LOSSES, PARTS, check_losses

    losses, precisions = args.loss or list(LOSSES), args.precision or list(BOUNDS)
    results: list[Result] = []
    for found in check_losses(losses, processes=args.processes, precisions=precisions):
        if not results:
            print(f"relative error of the gradient, the largest of {', '.join(losses)},")
            print("against the plain formula in float64 on one process, of 300 pairs; 0: equal, bit for bit")
            heads = " ".join(f"{part:>11}" for part in PARTS)
            print("  ".join(COLUMNS), heads, f"{'bound':>7}  largest at")
        results += found
        for way in _ways(found):
            _show(way)
    failed = [result for result in results if not result.passed]
    for result in failed:
        print(f"BEYOND ITS BOUND: {result.case}: {result.errors}")
    print(f"{len(results)} cases, {len(failed)} beyond their bound")
    return FAILED if failed else 0


def _ways(results: list[Result]) -> list[list[Result]]:
    """The results of all losses, put together by everything else."""
    ways: dict[tuple[object, ...], list[Result]] = {}
    for result in results:
        ways.setdefault(tuple(getattr(result.case, name) for name in COLUMNS), []).append(result)
    return list(ways.values())


def _show(way: list[Result]) -> None:
    """One row: the largest error of each part among the losses, and the loss that has the largest of all."""
    case = way[0].case
    cells = [str(getattr(case, name) or "none").ljust(len(name)) for name in COLUMNS]
    errors = {part: max(result.errors[part] for result in way) for part in way[0].errors}
    worst = max(way, key=lambda result: max(result.errors.values()))
    numbers = " ".join(f"{error:11.1e}" if error else f"{'0':>11}" for error in errors.values())
    print("  ".join(cells), numbers, f"{way[0].bound:7.0e}  {worst.case.loss}", flush=True)

"""``contrastive interpolate``: the weights between a model and what fine-tuning made of it."""

from __future__ import annotations

import argparse
from typing import Any

NAME = "interpolate"
HELP = "mix the weights of a model and of its fine-tuned self (WiSE-FT), or measure mixtures"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("start", help="the model before: a run folder or a model folder")
    parser.add_argument("tuned", help="the same model after fine-tuning")
    parser.add_argument("dest", nargs="?", help="the model folder to write; with --alphas, DEST/alpha_A of each")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--alpha", default="0.5", metavar="A", help="share of TUNED, 0 to 1 (default: 0.5)")
    which.add_argument("--alphas", metavar="A,A", help="several, such as 0,0.25,0.5,0.75,1")
    parser.add_argument(
        "--evaluate",
        action="append",
        default=[],
        metavar="DATA",
        help="print the zero-shot accuracy of each on this set, labelled or of pairs; may be given again",
    )
    parser.add_argument("--templates", metavar="T", help="of the labelled sets, as in `contrastive evaluate`")
    parser.add_argument("--invert", action="store_true", help="turn the images of labelled sets into their negatives")


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    import torch

    from contrastive.cli.output import check_output_folder, write_rows
    from contrastive.errors import UserError
    from contrastive.models import interpolate, load, save_model

    alphas = _shares(args.alphas or args.alpha)
    if args.dest is None and not args.evaluate:
        raise UserError("name a folder to write (START TUNED DEST), sets to measure on (--evaluate DATA), or both")
    check_output_folder("DEST", args.dest)
    start, tuned = load(args.start, device="cpu"), load(args.tuned, device="cpu")
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    rows = []
    for alpha in alphas:
        mixed = interpolate(start, tuned, alpha)
        row: dict[str, Any] = {"alpha": alpha}
        if args.dest is not None:
            folder = Path(args.dest) / f"alpha_{alpha:g}" if args.alphas else Path(args.dest)
            row["model"] = str(save_model(mixed, folder))
        mixed.to(device)
        row |= {data: _top1(mixed, data, args.templates, args.invert) for data in args.evaluate}
        rows.append(row)
    write_rows(rows, "table")
    return 0


def _shares(text: str) -> list[float]:
    from contrastive.errors import UserError

    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"alpha {text}: give numbers from 0 to 1, several separated by commas") from None


def _top1(model: Any, data: str, templates: str | None, invert: bool) -> float:
    """Zero-shot top-1 among the classes of a labelled set, or among the distinct captions of pairs."""
    from pathlib import Path

    from contrastive.evaluation import evaluate_labelled, evaluate_pairs
    from contrastive.shards import open_source

    if getattr(next(iter(open_source(data)), None), "label", None) is not None:
        found = evaluate_labelled(model, Path(data).stem, None, data, ("zeroshot",), templates, invert=invert)
    else:
        found = evaluate_pairs(model, data)
    return float(found.results["zeroshot"]["top1"]["value"])

"""``contrastive plan``: what a run will need, before it starts."""

from __future__ import annotations

import argparse
import sys
from typing import Any

NAME = "plan"
HELP = "tell a run's memory, seconds, traffic and bottleneck on given GPUs, before it starts"

# option, type, and what it is; the names are those of `contrastive.plan.recipe.Choices`
NUMBERS = (
    ("--per-node", int, "N", "GPUs of one machine (default: 8)"),
    ("--samples", int, "N", "pairs of the training set, where it is not here"),
    ("--tokens", int, "N", "tokens of a caption (default: the tokenizer's context)"),
    ("--price", float, "P", "of one GPU for an hour, to tell the cost"),
    ("--utilisation", float, "SHARE", "of the peak that products reach (default: 0.3; of a measured peak 0.8)"),
    ("--memory-utilisation", float, "SHARE", "of the memory's bandwidth (default: 0.45; of a measured one 0.8)"),
    ("--link-utilisation", float, "SHARE", "of the links' bandwidth (default: 0.7)"),
    ("--overlap", float, "SHARE", "of the last backward that hides the gradients' all-reduce (default: 0)"),
    ("--link", float, "GB/s", "between GPUs of a machine, one direction (default: the GPU's NVLink or PCIe)"),
    ("--network", float, "GB/s", "of one GPU to other machines, one direction (default: 25)"),
    ("--reserve", float, "GiB", "for context, libraries and fragmentation (default: 2)"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from contrastive.plan.cards import CARDS, HERE

    parser.add_argument("recipe", help="a YAML file, or the name of a shipped recipe such as pretrain/pictograms")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="changes to the recipe")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="processes, one a GPU (default: 1)")
    names = ", ".join(CARDS)
    parser.add_argument("--gpu", default=HERE, metavar="NAME", help=f"{names}; {HERE} (default): measure this machine")
    for option, kind, metavar, text in NUMBERS:
        parser.add_argument(option, type=kind, metavar=metavar, help=text)
    parser.add_argument("--json", action="store_true", help="every number, as JSON")


def run(args: argparse.Namespace) -> int:
    from contrastive.config import load_config
    from contrastive.plan.cards import HERE, find_card

    if args.gpu.lower() != HERE:
        find_card(args.gpu)  # before the seconds that torch takes
    if "" not in sys.path:  # a loss of the user's own lies where the user is
        sys.path.insert(0, "")
    config = load_config(args.recipe, args.overrides)
    from contrastive.plan.recipe import Choices, make_plan
    from contrastive.plan.report import as_json, lines

    names = [option[2:].replace("-", "_") for option, *_ in NUMBERS]
    given: dict[str, Any] = {name: value for name in names if (value := getattr(args, name)) is not None}
    plan = make_plan(config, Choices(gpus=args.gpus, gpu=args.gpu, **given))
    if args.json:
        import json

        print(json.dumps(as_json(plan), indent=2))
    else:
        print("\n".join(lines(plan)))
    return 0

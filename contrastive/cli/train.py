"""``contrastive train``: pretrain a two-tower model from a recipe."""

from __future__ import annotations

import argparse
import faulthandler
import os
import shlex
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Literal

NAME = "train"
HELP = "pretrain a model from a recipe; also under accelerate launch and torchrun"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a YAML file, or the name of a shipped recipe such as pretrain/pictograms")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="changes to the recipe")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of the run folder")
    parser.add_argument(
        "--auto-resume", action="store_true", help="go on where there is a checkpoint, else start: for schedulers"
    )
    parser.add_argument("--overwrite", action="store_true", help="delete an earlier run in the same folder")
    parser.add_argument("--print-config", action="store_true", help="print the resolved recipe and stop")
    parser.add_argument("--allow-pipe", action="store_true", help="run the commands of pipe: shards; no recipe can")
    parser.add_argument("--dry-run", action="store_true", help="check the recipe, build the model, train nothing")


def run(args: argparse.Namespace) -> int:
    from contrastive.config import dump_yaml, load_config
    from contrastive.errors import UserError

    ways = {"--resume": args.resume, "--auto-resume": args.auto_resume, "--overwrite": args.overwrite}
    given = [way for way, chosen in ways.items() if chosen]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)}: give one of them")
    if sys.__stderr__ is not None and not faulthandler.is_enabled():
        with suppress(ValueError, OSError):  # it is closed
            faulthandler.enable(sys.__stderr__)  # else a crash in C, days into a run, says nothing of where it was
    if "" not in sys.path:  # a loss of the user's own lies where the user is, also for an installed command
        sys.path.insert(0, "")
    config = load_config(args.recipe, args.overrides)
    if args.print_config:
        print(dump_yaml(config), end="")
        return 0
    if args.allow_pipe:
        from contrastive.shards.storage import configure

        configure(allow_pipe=True)
    if args.dry_run:
        from contrastive.pretrain import dry_run

        print(dry_run(config))
        return 0
    from contrastive.pretrain import STOPPED, pretrain

    resume: bool | Literal["if possible"] = args.resume
    # torchrun's --max-restarts and SLURM's requeue start the same command again
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) + int(os.environ.get("SLURM_RESTART_COUNT", 0))
    if args.auto_resume or again:
        resume = "if possible"
    results = pretrain(config, resume=resume, overwrite=args.overwrite and not again)
    if results is None and "RANK" not in os.environ:  # else a launcher stands before it
        installed = shutil.which("contrastive") == str(Path(sys.executable).with_name("contrastive"))
        program = ["contrastive"] if installed else [sys.executable, "-m", "contrastive"]
        options = ["--allow-pipe"] if args.allow_pipe else []
        print("go on with: " + shlex.join([*program, "train", args.recipe, *args.overrides, *options, "--resume"]))
    return STOPPED if results is None else 0

"""The command line: one file a command, and only the chosen one is imported.

A command module has NAME, HELP, `add_arguments(parser)` and `run(args) -> exit code`; it imports what is
heavy inside `run`.
"""

from __future__ import annotations

import argparse
import difflib
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn, Protocol, cast

from contrastive.errors import Fault, UserError

COMMANDS = (
    "train", "shard", "check", "tokenizer", "embed", "classify", "probe", "evaluate", "interpolate", "recipes", "bench",
    "plan", "find", "selfcheck",
)  # fmt: skip


class Command(Protocol):
    """What a command module offers."""

    NAME: str
    HELP: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, args: argparse.Namespace) -> int: ...


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see `{self.prog} --help`)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 2 for the user's mistake, 1 for a fault, 130 when interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    # One line a warning: the place in our code says nothing to whoever typed a command.
    if hasattr(sys.stdout, "reconfigure"):  # a name that is not UTF-8 must not end a run after all the work
        sys.stdout.reconfigure(errors="backslashreplace")
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        if not argv or argv[0].startswith("-"):
            return _overview(argv)
        return _run(argv[0], argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, Fault) else 2
    except OSError as error:  # a folder that is missing, no permission, a full disk
        print(f"error: {error.filename or 'file'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _run(name: str, argv: list[str]) -> int:
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"Did you mean '{close[0]}'?" if close else f"Commands: {', '.join(COMMANDS)}"
        raise UserError(f"unknown command '{name}'. {hint}")
    command = _command(name)
    parser = _Parser(prog=f"contrastive {name}", description=_sentence(command.HELP), allow_abbrev=False)
    command.add_arguments(parser)
    try:
        args = parser.parse_intermixed_args(argv)  # overrides may stand on both sides of an option
    except TypeError:  # argparse cannot do that for commands with sub-commands
        args = parser.parse_args(argv)
    return command.run(args)


def _overview(argv: list[str]) -> int:
    if argv == ["--version"]:
        from contrastive import __version__

        print(f"contrastive {__version__}")
        return 0
    width = max(map(len, COMMANDS)) + 2
    commands = "\n".join(f"  {name:<{width}}{_command(name).HELP}" for name in COMMANDS)
    parser = _Parser(
        prog="contrastive",
        usage="contrastive COMMAND ...",
        description="Pretrain image-text towers on pairs, classify by label text, probe new data sets.",
        epilog=f"commands:\n{commands}\n\n`contrastive COMMAND --help` describes one of them.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="show the version and exit")
    parser.parse_args(argv)
    parser.print_help()
    return 0


def _command(name: str) -> Command:
    return cast(Command, import_module(f"contrastive.cli.{name}"))


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:].rstrip(".") + "."

"""``contrastive check``: index shards, say what is wrong with them, and print their data card."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

NAME = "check"
HELP = "validate and index shards, and print what they hold"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", help="a folder of shards, one tar, a glob or a URL")
    parser.add_argument("--html", metavar="FILE", help="also write a page with the card and a sheet of thumbnails")
    parser.add_argument("--json", metavar="FILE", help="also write the card as JSON; - for standard output")
    parser.add_argument("--full", action="store_true", help="read every byte again and compare with the index's hashes")
    parser.add_argument("--skip-damaged", action="store_true", help="leave damaged shards out; training then does too")
    parser.add_argument("--context", type=int, default=77, metavar="N", help="tokens that the text tower takes (77)")
    parser.add_argument(
        "--tokenizer", metavar="FILE", help="a tokenizer.json, or open_clip, to count tokens by; else estimated"
    )
    parser.add_argument("--allow-pipe", action="store_true", help="run the commands of pipe: shards")


def run(args: argparse.Namespace) -> int:
    from contrastive.cli.output import check_output
    from contrastive.errors import UserError
    from contrastive.shards import open_index, storage
    from contrastive.shards.card import data_card, format_card
    from contrastive.shards.contact_sheet import write_contact_sheet
    from contrastive.shards.record import Rejected

    if args.context < 1:
        raise UserError(f"--context {args.context}: give at least 1")
    if args.allow_pipe:
        storage.configure(allow_pipe=True)
    index = open_index(args.shards, skip_damaged=args.skip_damaged)
    for option, target in (("--html", args.html), ("--json", None if args.json == "-" else args.json)):
        check_output(option, target)
    if args.full:
        index.verify()
        whole = len(index.shards) - len(index.manifest["damaged"])
        print(f"all bytes of {whole} shards are those that were indexed (sha256)", file=sys.stderr)
    count_tokens = None
    if args.tokenizer:
        count_tokens = _counter(args.tokenizer)
    try:
        card = data_card(index, context=args.context, count_tokens=count_tokens)
    except Rejected as fault:  # a shard that was replaced or deleted while it was looked at
        raise UserError(f"{args.shards}: {fault.reason}; run the check again") from None
    if args.json == "-":
        print(json.dumps(card, indent=1, ensure_ascii=False))
    else:
        print(format_card(card, str(args.shards)))
        for line in index.notes:
            print(f"  {line}")
        if args.json:
            Path(args.json).write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if args.html:
        page = write_contact_sheet(args.html, index, card, str(args.shards))
        print(f"page: {page}", file=sys.stderr if args.json == "-" else sys.stdout)
    unreadable = sum(card["images"]["unreadable"].values())
    if unreadable == card["looked_at"]:
        raise UserError(f"{args.shards}: not one of the {unreadable} images looked at can be decoded")
    return 0


def _counter(tokenizer: str) -> Callable[[list[str]], list[int]]:
    from contrastive.models import CorpusTokenizer, OpenClipTokenizer

    uncut = 1 << 14
    tokenize = OpenClipTokenizer(context=uncut) if tokenizer == "open_clip" else CorpusTokenizer(tokenizer, uncut)

    def count(captions: list[str]) -> list[int]:
        counts: list[int] = []
        for start in range(0, len(captions), 64):
            tokens = tokenize(captions[start : start + 64])
            counts += (tokens != tokenize.pad_id).sum(dim=1).tolist()
        return counts

    return count

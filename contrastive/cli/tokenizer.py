"""``contrastive tokenizer``: a tokenizer trained on the captions of a corpus."""

from __future__ import annotations

import argparse

NAME = "tokenizer"
HELP = "train a tokenizer on the captions of a data set"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="shards, or anything that `contrastive shard` reads")
    parser.add_argument("output", help="the tokenizer file to write (.json)")
    parser.add_argument("--vocab-size", type=int, default=8000, help="most tokens (default: 8000)")
    parser.add_argument("--keep-case", action="store_true", help="tell upper from lower case")
    parser.add_argument("--caption", help="name of the caption column (default: guessed)")


def run(args: argparse.Namespace) -> int:
    from collections import Counter
    from pathlib import Path

    from contrastive.cli.output import check_output
    from contrastive.errors import UserError
    from contrastive.models import train_tokenizer
    from contrastive.shards import open_source

    if args.vocab_size < 16:
        raise UserError(f"--vocab-size {args.vocab_size}: at least 16 are needed")
    check_output("OUTPUT", args.output, makes_folders=True)
    captions = [text for record in open_source(args.source, caption=args.caption) for text in record.captions]
    if not captions:
        raise UserError(f"{args.source}: no captions to train on")
    tokenizer = train_tokenizer(captions, vocab_size=args.vocab_size, lowercase=not args.keep_case)
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(output))
    lengths = Counter(len(encoding.ids) for encoding in tokenizer.encode_batch(captions))
    total = sum(lengths.values())
    covered, longest = 0, 0
    for length in sorted(lengths):
        covered += lengths[length]
        if covered >= 0.99 * total and not longest:
            longest = length
    print(f"{output}: {tokenizer.get_vocab_size():,} tokens from {total:,} captions")
    print(f"tokens per caption: 99 % have at most {longest}, the longest has {max(lengths)}")
    return 0

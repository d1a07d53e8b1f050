"""``contrastive shard``: whatever the user has, as tar shards."""

from __future__ import annotations

import argparse

NAME = "shard"
HELP = "turn a table, an image folder or other shards into tar shards"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="a Parquet, CSV, TSV or JSONL file, a folder of images or of shards, or a glob")
    parser.add_argument("dest", help="the folder to write")
    parser.add_argument("--image", metavar="COL", help="column of the image: bytes, or a path relative to the table")
    parser.add_argument("--caption", metavar="COL", help="column of the caption")
    parser.add_argument("--label", metavar="COL", help="column of the class name")
    parser.add_argument("--samples-per-shard", type=int, default=1000, metavar="N", help="default: 1000")
    parser.add_argument("--limit", type=int, metavar="N", help="read the first N rows only")
    parser.add_argument("--overwrite", action="store_true", help="replace the shards in DEST")


def run(args: argparse.Namespace) -> int:
    from contrastive.shards import open_index, open_source, write_shards

    source = open_source(args.source, image=args.image, caption=args.caption, label=args.label, limit=args.limit)
    manifest = write_shards(source, args.dest, samples_per_shard=args.samples_per_shard, overwrite=args.overwrite)
    open_index(args.dest)  # reads back every header and caption, and saves the index
    print(f"{args.dest}: {manifest.pairs:,} pairs in {len(manifest.shards):,} shards")
    for reason, count in manifest.skipped.items():
        print(f"  skipped: {count:,} ({reason})")
    share = manifest.duplicate_captions / manifest.pairs
    print(f"  pairs whose caption occurred before: {manifest.duplicate_captions:,} ({share:.1%})")
    return 0

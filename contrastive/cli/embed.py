"""``contrastive embed``: the embeddings of a data set, kept on disk for every later command."""

from __future__ import annotations

import argparse

from contrastive.cli.output import add_split_argument

NAME = "embed"
HELP = "embed images and captions once, into a folder that evaluate reads; also under torchrun"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a run folder, a model folder, or an open_clip name")
    parser.add_argument("source", help="images, with or without captions and labels: a folder, glob, table or shards")
    parser.add_argument("dest", help="the folder to keep the embeddings in; several sets and models may share it")
    add_split_argument(parser)
    parser.add_argument("--label", metavar="COL", help="column of the label (default: guessed)")
    parser.add_argument("--captions", choices=("all", "first", "none"), default="all", help="default: all")
    parser.add_argument("--invert", action="store_true", help="turn the images into their negatives first")
    parser.add_argument("--dtype", choices=("bf16", "fp16"), help="compute in this precision (default: the weights')")
    parser.add_argument("--batch-size", type=int, default=256, metavar="N", help="default: 256")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="threads that decode ahead (default: 2)")
    parser.add_argument(
        "--max-unreadable", type=float, default=0.05, metavar="SHARE", help="of the images (default: 0.05)"
    )


def run(args: argparse.Namespace) -> int:
    import os
    import time

    import torch
    import torch.distributed as dist

    from contrastive.cli.data import open_data
    from contrastive.cli.images import check_model
    from contrastive.cli.output import check_output_folder, print_left_out
    from contrastive.evaluation import embed
    from contrastive.models import load

    check_output_folder("DEST", args.dest)
    check_model(args.model, [args.source])
    source = open_data(args.source, label=args.label, split=args.split)
    started = time.perf_counter()
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    own_group = ranks > 1 and not dist.is_initialized()
    device = None
    if ranks > 1 and torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        device = f"{kind}:{os.environ.get('LOCAL_RANK', '0')}"
    if own_group:
        dist.init_process_group("gloo")  # barriers only: the rows go to disk
    try:
        found = embed(
            load(args.model, device=device),
            source,
            batch_size=args.batch_size,
            features="both",
            workers=args.workers,
            text=False if args.captions == "none" else args.captions,
            invert=args.invert,
            dtype={None: None, "bf16": torch.bfloat16, "fp16": torch.float16}[args.dtype],
            cache=args.dest,
            max_unreadable=args.max_unreadable,
        )
        first = not dist.is_initialized() or dist.get_rank() == 0
    finally:
        if own_group:
            dist.destroy_process_group()
    if first:
        assert found.image_tower is not None
        texts = 0 if found.text is None else len(found.text)
        width = f"width {found.image.shape[1]}, {found.image_tower.shape[1]} before the projection"
        seconds = time.perf_counter() - started
        print(f"{args.dest}: {len(found.image):,} images, {texts:,} captions, {width}; {seconds:.0f} s")
        print_left_out(source, found.outcomes, captions=args.captions != "none")
    return 0

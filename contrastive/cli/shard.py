"""``contrastive shard``: whatever the user has, as tar shards."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from contrastive.shards.pools import Runner

NAME = "shard"
HELP = "turn a table, an image folder, a saved data set or other shards into tar shards"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        help="a Parquet, CSV, TSV or JSONL file, COCO's or Karpathy's JSON, a folder of images, of shards, of tables "
        "or saved by Hugging Face's datasets, or a glob",
    )
    parser.add_argument("dest", help="the folder to write; it grows as DEST.unfinished, and a new run goes on there")
    parser.add_argument("--image", metavar="COL", help="column of the image: bytes, or a path relative to the table")
    parser.add_argument("--caption", metavar="COL", help="column of the caption")
    parser.add_argument("--label", metavar="COL", help="column of the class name")
    parser.add_argument(
        "--allow-outside", action="store_true", help="read images by paths that leave the table's folder"
    )
    parser.add_argument("--samples-per-shard", type=int, default=1000, metavar="N", help="rows a shard (default: 1000)")
    parser.add_argument("--split", metavar="NAME", help="of several splits the one to read, or several: train+val")
    parser.add_argument("--images", metavar="FOLDER", help="folder of the images that a JSON names (default: near it)")
    parser.add_argument("--limit", type=int, metavar="N", help="read the first N rows only")
    parser.add_argument("--overwrite", action="store_true", help="replace the shards in DEST")

    where = parser.add_argument_group("where it runs (the bytes are the same everywhere)")
    where.add_argument("--workers", type=int, default=1, metavar="N", help="processes of this machine (default: 1)")
    where.add_argument(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="a Ray cluster (default: RAY_ADDRESS, or this machine); its nodes must see SOURCE and DEST",
    )

    parser.add_argument(
        "--group",
        action=argparse.BooleanOptionalAction,
        help="rows of a table with the same image are one sample with several captions (default: where the column "
        "holds paths)",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="decode every image now, and skip those that training could not decode",
    )

    images = parser.add_argument_group("images (their bytes stay untouched unless asked)")
    images.add_argument("--resize", type=int, metavar="PX", help="shrink to this many pixels; nothing is enlarged")
    images.add_argument(
        "--resize-mode", default="shorter", metavar="SIDE", help="side meant: shorter (default), longer"
    )
    images.add_argument("--format", metavar="FORMAT", help="re-encode as webp, jpeg or png what is not yet")
    images.add_argument("--quality", type=int, default=90, metavar="Q", help="of webp and jpeg, 1-100 (default: 90)")

    filters = parser.add_argument_group("filters (what is left out is counted by reason)")
    filters.add_argument("--min-size", type=int, metavar="PX", help="least pixels of the shorter side")
    filters.add_argument("--max-aspect", type=float, metavar="R", help="most of longer side over shorter side")
    filters.add_argument("--min-caption", type=int, metavar="N", help="least characters of the caption")
    filters.add_argument("--max-caption", type=int, metavar="N", help="most characters of the caption")
    filters.add_argument(
        "--deduplicate",
        metavar="WHAT",
        help="keep the first of equal captions (caption), images (image) or either (both)",
    )
    filters.add_argument(
        "--clip-score", metavar="MODEL:MIN", help="least cosine of image and caption, by a run or model folder of yours"
    )


def run(args: argparse.Namespace) -> int:
    from contrastive.errors import UserError
    from contrastive.shards import Filters, Transform, make_shards, on_processes, on_ray, open_index, open_source
    from contrastive.shards.left_out import left_out_line
    from contrastive.shards.remedies import hint
    from contrastive.shards.skipped import REJECTED
    from contrastive.shards.tables import GROUPED
    from contrastive.shards.write import check_writable

    if args.ray is not None and args.workers != 1:
        raise UserError("--workers is for this machine and --ray for a cluster; give one of them")
    runner = on_processes(args.workers) if args.ray is None else on_ray(args.ray or None)
    filters = Filters(args.min_size, args.max_aspect, args.min_caption, args.max_caption, args.deduplicate)
    transform = Transform(args.resize, args.resize_mode, args.format, args.quality)
    scorer = ClipScore.parse(args.clip_score) if args.clip_score else None
    check_writable(Path(args.dest))  # before the source is read
    source = open_source(
        args.source,
        image=args.image,
        caption=args.caption,
        label=args.label,
        limit=args.limit,
        allow_outside=args.allow_outside,
        group=args.group,
        split=args.split,
        images=args.images,
    )
    if args.group is False and not source.columns:
        raise UserError(f"--no-group: is for the rows of a table, and {args.source} is none; leave it out")
    apart = "; --no-group keeps the rows apart"
    notes = [line + apart if line.startswith(GROUPED) else line for line in source.notes]
    for line in (*notes, left_out_line(source.rejected)):
        if line:
            print(line)
    manifest = make_shards(
        source,
        args.dest,
        samples_per_shard=args.samples_per_shard,
        overwrite=args.overwrite,
        filters=filters,
        transform=transform,
        scorer=scorer,
        verify=args.verify,
        runner=watched(runner),
    )
    open_index(args.dest)  # reads back every header and caption, and saves the index
    print(f"{args.dest}: {_counted(manifest.pairs, 'pair')} in {_counted(len(manifest.shards), 'shard')}")
    for line in manifest.notes:
        print(f"  {line}")
    for reason, count in (Counter(manifest.skipped) - Counter(source.rejected)).most_common():
        remedy = hint(reason)
        print(f"  skipped: {count:,} ({reason}{remedy and '; '}{remedy})")
    if (listed := Path(args.dest) / REJECTED).exists():
        print(f"  skipped rows are listed in {listed}")
    share = manifest.duplicate_captions / manifest.pairs
    print(f"  pairs whose caption occurred before: {manifest.duplicate_captions:,} ({share:.1%})")
    return 0


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


class ClipScore:
    """The cosine of image and caption by a model, opened at the first use in every process.

    On a CPU it computes with one thread, so that a score does not depend on the machine's cores.
    """

    def __init__(self, model: str, minimum: float) -> None:
        self.model, self.minimum = model, minimum
        self._loaded: Any = None

    @classmethod
    def parse(cls, text: str) -> ClipScore:
        """From MODEL:MIN."""
        from contrastive.errors import UserError

        model, _, minimum = text.rpartition(":")
        try:
            score = cls(model, float(minimum))
        except ValueError:
            score = cls("", 0.0)
        if not model or not -1 <= score.minimum <= 1:
            raise UserError(f"--clip-score {text}: give MODEL:MIN, MIN from -1 to 1, like runs/mine:0.2")
        score._open()  # a mistake in the name is told at once
        return score

    def identity(self) -> Any:
        folder = Path(self.model)
        files = sorted(p for p in folder.rglob("*") if p.suffix in (".json", ".safetensors")) if folder.is_dir() else []
        stats = [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files]
        return {"model": self.model, "minimum": self.minimum, "files": stats}

    def prepare(self, image: Any) -> Any:
        return self._open().preprocess(image)

    def score(self, images: Sequence[Any], captions: Sequence[str]) -> list[float]:
        import torch

        model = self._open()
        with torch.inference_mode():
            image_ND = model.encode_image(torch.stack(list(images)).to(model.device))
            text_ND = model.encode_text(model.tokenize(captions).to(model.device))
            return (image_ND.float() * text_ND.float()).sum(-1).tolist()

    def _open(self) -> Any:
        if self._loaded is None:
            import torch

            from contrastive.models import load

            self._loaded = load(self.model)
            if self._loaded.device.type == "cpu":
                torch.set_num_threads(1)
        return self._loaded

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaded": None}


def watched(runner: Runner, every: float = 30.0) -> Runner:
    """The same runner, with a live bar on a terminal, else a line every so many seconds, on standard error."""

    def run(function: Callable[[Any, Any], None], job: Any, tasks: Sequence[Any], what: str) -> Iterator[Any]:
        from tqdm import tqdm

        total = sum(_rows(task) for task in tasks)
        bar = tqdm(total=total, desc=what, unit=" rows", unit_scale=True, leave=False, disable=not sys.stderr.isatty())
        start = last = time.monotonic()
        done = 0
        with bar:
            for task in runner(function, job, tasks, what):
                done += _rows(task)
                bar.update(_rows(task))
                now = time.monotonic()
                if bar.disable and now - last >= every:
                    last = now
                    rate = done / (now - start)
                    left = (total - done) / rate / 60
                    line = f"{what}: {done:,} of {total:,} rows, {rate:,.0f} a second, {left:,.0f} minutes left"
                    print(line, file=sys.stderr, flush=True)
                yield task

    return run


def _rows(task: Any) -> int:
    return int(task.part.records)

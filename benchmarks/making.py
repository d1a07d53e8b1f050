"""Pairs a second that one core makes into shards, step by step: a table, and benchmarks/results/making.json.

    python benchmarks/making.py [PAIRS] [REPEATS]
    python benchmarks/making.py --once copy       one short run for against.py: a JSON line with the seconds of a call

The process pins itself to one core. The pairs are crops of scikit-learn's two photographs, as JPEG files of 400 to
800 pixels (quality 90) in a Parquet file; the model of the CLIP score is the one of recipes/pretrain/pictograms.yaml
with random weights (its speed does not depend on them). Seconds are those of the whole call, with the reading of the
table, every fsync and the renames; the median of the repeats counts, which take turns.
"""

import io
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from contrastive.build import build_model
from contrastive.cli.shard import ClipScore
from contrastive.config import load_config
from contrastive.models import save_model, train_tokenizer
from contrastive.shards import Filters, Transform, make_shards, open_index, open_source

RESULT = Path(__file__).parent / "results" / "making.json"
SIZES = (400, 801)


def write_table(path: Path, pairs: int) -> int:
    """The source; returns the bytes of its images."""
    from sklearn.datasets import load_sample_images

    photos = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    draw = np.random.default_rng(0)
    images, captions = [], []
    for number in range(pairs):
        photo = photos[number % len(photos)]
        width, height = (int(side) for side in draw.integers(*SIZES, 2))
        share = draw.uniform(0.5, 1)
        crop = [int(side * share) for side in photo.size]
        left, top = (int(draw.integers(0, side - cut + 1)) for side, cut in zip(photo.size, crop, strict=True))
        buffer = io.BytesIO()
        box = (left, top, left + crop[0], top + crop[1])
        photo.resize((width, height), Image.Resampling.BICUBIC, box=box).save(buffer, "JPEG", quality=90)
        images.append(buffer.getvalue())
        captions.append(f"photograph number {number}, {width} by {height} pixels")
    pq.write_table(pa.table({"image": images, "caption": captions}), path, row_group_size=100, compression="none")
    return sum(map(len, images))


def write_model(folder: Path) -> Path:
    """The pictograms model, as it is before training."""
    config = load_config("pretrain/pictograms")
    words = [f"word{number} of a caption" for number in range(3000)]
    return save_model(build_model(config, train_tokenizer(words, vocab_size=8000).to_str()), folder)


ONCE: dict[str, dict[str, Any]] = {
    "copy": {},
    "deduplicate": {"filters": Filters(deduplicate="both")},
    "jpeg": {"transform": Transform(256, format="jpeg")},
    "index": {},
}
ONCE_PAIRS, ONCE_SECONDS = 1000, 5.0


def once_table() -> Path:
    """The photographs of short runs, made at the first use."""
    table = RESULT.parent.parent.parent / "build" / f"making-{ONCE_PAIRS}.parquet"
    if not table.exists():
        table.parent.mkdir(exist_ok=True)
        write_table(table.with_suffix(".part"), ONCE_PAIRS)
        os.replace(table.with_suffix(".part"), table)  # the name appears when the file is complete
    return table


def once(case: str) -> dict[str, float]:
    """Mean seconds of a call over a few of them, after one that does not count: elapsed, and of the processor."""
    table = once_table()
    elapsed, busy = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if case == "index":
            make_shards(open_source(table), folder / "to-index")
        while len(elapsed) < 4 or sum(elapsed) < ONCE_SECONDS:
            shutil.rmtree(folder / "out", ignore_errors=True)
            start, used = time.perf_counter(), time.process_time()
            if case == "index":
                index(folder / "to-index")
            else:
                make_shards(open_source(table), folder / "out", **ONCE[case])
            elapsed.append(time.perf_counter() - start)
            busy.append(time.process_time() - used)
    return {"seconds": statistics.fmean(elapsed[1:]), "processor seconds": statistics.fmean(busy[1:])}


def main() -> None:
    if len(sys.argv) == 3 and sys.argv[1] == "--once" and sys.argv[2] in ONCE:
        print(json.dumps(once(sys.argv[2])))
        return
    if sys.argv[1:2] == ["--once"]:
        sys.exit(f"--once: give one of {', '.join(ONCE)}")
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    repeats = int(sys.argv[2]) if len(sys.argv) > 2 else 5
    core = min(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_table(folder / "x.parquet", pairs)
        scorer = ClipScore(str(write_model(folder / "model")), -1.0)
        scorer.score([scorer.prepare(Image.new("RGB", (64, 64)))], ["warm up"])

        def make(**options: Any) -> Callable[[Path], None]:
            return lambda dest: void(make_shards(open_source(folder / "x.parquet"), dest, **options))

        make()(folder / "to-index")
        cases: dict[str, Callable[[Path], None]] = {
            "copy": make(),
            "deduplicate (first pass and copy)": make(filters=Filters(deduplicate="both")),
            "resize to 256, jpeg": make(transform=Transform(256, format="jpeg")),
            "resize to 256, webp": make(transform=Transform(256, format="webp")),
            "CLIP score and copy": make(scorer=scorer),
            "index": lambda dest: index(folder / "to-index"),
        }
        seconds: dict[str, list[float]] = {case: [] for case in cases}
        stored: dict[str, int] = {}
        for _ in range(repeats):
            for case, work in cases.items():
                dest = folder / "out"
                start = time.perf_counter()
                work(dest)
                seconds[case].append(time.perf_counter() - start)
                made = folder / "to-index" if case == "index" else dest
                stored[case] = sum(path.stat().st_size for path in made.glob("*.tar"))
                shutil.rmtree(dest, ignore_errors=True)
    rows = {
        case: {
            "pairs_per_second": round(pairs / statistics.median(found), 1),
            "slowest_and_fastest": [round(pairs / max(found), 1), round(pairs / min(found), 1)],
            "bytes_per_pair": round(stored[case] / pairs),
        }
        for case, found in seconds.items()
    }
    source = {"pairs": pairs, "repeats": repeats, "bytes_per_image": round(size / pairs), "load": os.getloadavg()[0]}
    RESULT.write_text(json.dumps({**source, "one_core": rows}, indent=2) + "\n", encoding="utf-8")
    print(f"{pairs:,} JPEG of 400-800 px, {size / pairs / 1e3:.0f} kB each; one core; load {source['load']:.1f}")
    for case, row in rows.items():
        print(f"{case:<36}{row['pairs_per_second']:>10,.0f} pairs/s {row['bytes_per_pair']:>10,} bytes a pair")


def index(folder: Path) -> None:
    """Build the index anew."""
    for path in folder.glob("*index*"):
        path.unlink()
    open_index(folder)


def void(_: object) -> None:
    """Nothing."""


if __name__ == "__main__":
    main()

"""Retrieval ranks in both directions beside the matrix product alone: time in turn, and peak memory.

    python benchmarks/retrieval.py                      prints a table, writes benchmarks/results/retrieval.json
    python benchmarks/retrieval.py --rows 4000          the larger case with a slice of its queries

5,000 images × 25,000 captions (five an image) and 100,000 × 100,000, 512 dimensions, float32. "ours" counts the ranks
of images among captions and of captions among images, pessimistically and optimistically; "product" multiplies the same
matrices in the same tiles and throws the scores away; where the score matrix fits (500 MB), "one product" makes it
in one call. They take turns behind a warm-up, medians count. Memory: a process of its own, the peak resident set
above what it held with the features in place; the scores of the larger case would take 40 GB. Keep the machine idle.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from contrastive.evaluation.retrieval import COLUMNS, ROWS, rank_both, tiles

RESULTS = Path(__file__).resolve().parent / "results" / "retrieval.json"
DIM = 512
CASES = ((5_000, 5), (100_000, 1))  # images, captions an image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, help="images of the larger case (default: all of them)")
    parser.add_argument("--rounds", type=int, default=5, help="of the smaller case; the larger has one")
    parser.add_argument(
        "--memory-of", nargs=3, type=int, metavar=("IMAGES", "CAPTIONS", "ROWS"), help=argparse.SUPPRESS
    )
    arguments = parser.parse_args()
    if arguments.memory_of:
        print(json.dumps(memory(*arguments.memory_of)))
        return
    rows = []
    for images, captions in CASES:
        part = min(images, arguments.rows or images) if images > 5_000 else images
        rounds = arguments.rounds if part * images * captions < 1e9 else 1
        rows.append(compare(images, captions, part, rounds))
        print(line(rows[-1]), flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    document = {"dim": DIM, "threads": torch.get_num_threads(), "torch": torch.__version__, "rows": rows}
    RESULTS.write_text(json.dumps(document, indent=2) + "\n")


def inputs(images: int, captions: int, part: int) -> tuple[torch.Tensor, ...]:
    """Features of pairs that resemble each other, and their ids; `part` of the images."""
    generator = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(images, DIM, generator=generator), dim=1)
    owners = torch.arange(images).repeat_interleave(captions)
    text = torch.empty(len(owners), DIM)
    for start in range(0, len(owners), 10_000):
        own = image[owners[start : start + 10_000]]
        text[start : start + 10_000] = F.normalize(own + 0.15 * torch.randn(own.shape, generator=generator), dim=1)
    return image[:part].clone(), text, torch.arange(part), owners


def product(image: torch.Tensor, text: torch.Tensor) -> None:
    """The scores, tile by tile, into the same memory."""
    memory = torch.empty(ROWS * COLUMNS)
    for rows, columns in tiles(len(image), len(text)):
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        torch.mm(image[rows], text[columns].T, out=memory[: shape[0] * shape[1]].view(shape))


def compare(images: int, captions: int, part: int, rounds: int) -> dict[str, Any]:
    """All in turn; then the memory of ours."""
    image, text, image_ids, text_ids = inputs(images, captions, part)
    systems: dict[str, Callable[[], Any]] = {
        "ours": lambda: rank_both(image, text, image_ids, text_ids),
        "product": lambda: product(image, text),
    }
    if part * images * captions < 1e9:
        systems["one product"] = lambda: image @ text.T
    product(image[:2048], text)  # warm-up
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for turn in range(rounds + (rounds > 1)):
        for name, call in systems.items():
            started = time.perf_counter()
            call()
            if turn or rounds == 1:
                seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    command = [sys.executable, __file__, "--memory-of", str(images), str(captions), str(part)]
    row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    ratios = [a / b for a, b in zip(seconds["ours"], seconds["product"], strict=True)]
    return row | {"seconds": medians, "ratio": statistics.median(ratios)}


def memory(images: int, captions: int, part: int) -> dict[str, Any]:
    """Peak resident bytes above those with the features in place, and in all."""
    features = inputs(images, captions, part)
    product(features[0][:1024], features[1][:1024])  # the library's own memory
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    held = resident("VmRSS")
    rank_both(*features)
    peak = resident("VmHWM")
    case = {"images": images, "captions": images * captions, "rows": part}
    return case | {"above_features_mb": (peak - held) / 1e6, "peak_mb": peak / 1e6}


def resident(field: str) -> int:
    for text in Path("/proc/self/status").read_text().splitlines():
        if text.startswith(field):
            return int(text.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def line(row: dict[str, Any]) -> str:
    times = "  ".join(f"{name} {seconds:.2f} s" for name, seconds in row["seconds"].items())
    case = f"{row['rows']:,} of {row['images']:,} x {row['captions']:,}"
    return f"{case:32} {times}  ratio {row['ratio']:.2f}  above features {row['above_features_mb']:.0f} MB"


if __name__ == "__main__":
    main()

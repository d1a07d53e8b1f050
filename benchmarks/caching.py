"""What large-batch caching (`train.chunk`) costs in time and leaves of the memory: open_clip's ViT-S-32 at 224 px.

    python benchmarks/caching.py             a step in 8 chunks beside the plain step on the same batch, fp32 and bf16
    python benchmarks/caching.py --memory    the peak resident set of a step of 4,096 pairs in chunks, bf16

Both print a table and write their part of benchmarks/results/caching.json. Times: the two steps take turns on one
model, five rounds behind a warm-up; the median counts, on captions of 16 tokens. Memory: 77 tokens, pixels as bytes,
everything that the process holds; the optimizer's moments are there before the step begins. Each figure comes from a
process of its own. Keep the machine idle otherwise.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from contrastive.losses import InfoNCE
from contrastive.models import open_clip_model
from contrastive.shards import Batch
from contrastive.training import adamw
from contrastive.training.step import TrainStep

RESULTS = Path(__file__).resolve().parent / "results" / "caching.json"
CHUNKS = 8
END_OF_TEXT = 49407  # open_clip's; the text tower pools there


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--batch", type=int, help="pairs; default 256, with --memory 4096")
    parser.add_argument("--chunk", type=int, default=8, help="pairs at once, with --memory; default 8")
    parser.add_argument("--length", type=int, help="tokens of a caption; default 16, with --memory 77")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=["fp32", "bf16"], help=argparse.SUPPRESS)  # of a process of its own
    arguments = parser.parse_args()
    if arguments.precision:
        measure = measure_memory if arguments.memory else measure_time
        print(json.dumps(measure(arguments)))
        return
    rows = []
    for precision in ["bf16"] if arguments.memory else ["fp32", "bf16"]:
        command = [sys.executable, __file__, *sys.argv[1:], "--precision", precision]
        rows.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
        print("  ".join(f"{key} {v if isinstance(v, str) else f'{v:.4g}'}" for key, v in rows[-1].items()), flush=True)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results["memory" if arguments.memory else "time"] = {"threads": torch.get_num_threads(), "rows": rows}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


def measure_time(arguments: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of the plain step and of the one in chunks."""
    batch = make_batch(arguments.batch or 256, arguments.length or 16)
    steps = make_steps(arguments.precision, [None, len(batch.tokens) // CHUNKS])
    seconds: list[list[float]] = [[] for _ in steps]
    for round_number in range(arguments.rounds + 1):
        for step, times in zip(steps, seconds, strict=True):
            started = time.perf_counter()
            step(batch, 1.0)
            if round_number:  # the first is the warm-up
                times.append(time.perf_counter() - started)
    plain, chunked = map(statistics.median, seconds)
    return {"precision": arguments.precision, "batch": len(batch.tokens), "chunks": CHUNKS,
            "plain_seconds": plain, "chunked_seconds": chunked, "ratio": chunked / plain}  # fmt: skip


def measure_memory(arguments: argparse.Namespace) -> dict[str, Any]:
    """The peak resident set of this process after one step in chunks."""
    (step,) = make_steps(arguments.precision, [arguments.chunk])
    length = arguments.length or 77
    step(make_batch(2, length), 1.0)  # from here on the optimizer has its moments
    before = peak_gib()
    batch = make_batch(arguments.batch or 4096, length)
    started = time.perf_counter()
    step(batch, 1.0)
    return {"precision": arguments.precision, "batch": len(batch.tokens), "chunk": arguments.chunk, "tokens": length,
            "seconds": time.perf_counter() - started, "peak_gib_before": before, "peak_gib": peak_gib()}  # fmt: skip


def make_steps(precision: str, chunks: list[int | None]) -> list[TrainStep]:
    """Training steps on one model and one optimizer, that differ in the chunk."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, mixed_precision="no" if precision == "fp32" else precision)
    model = open_clip_model("ViT-S-32")
    optimizer = adamw(model, lr=1e-5, weight_decay=0.1, betas=(0.9, 0.98), eps=1e-6)
    prepared, optimizer = accelerator.prepare(model.train(), optimizer)
    return [TrainStep(accelerator, prepared, InfoNCE(), optimizer, clip=1.0, chunk=chunk) for chunk in chunks]


def make_batch(n: int, length: int) -> Batch:
    """Random pixels and captions that fill `length` tokens."""
    tokens = torch.randint(1, END_OF_TEXT - 1, (n, length))
    tokens[:, -1] = END_OF_TEXT
    pixels = torch.randint(0, 256, (n, 3, 224, 224), dtype=torch.uint8)
    number = torch.arange(n)
    valid = torch.ones(n, dtype=torch.bool)
    return Batch(pixels, tokens, ids=number, samples=number, valid=valid, keys=[str(i) for i in range(n)])


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


if __name__ == "__main__":
    main()

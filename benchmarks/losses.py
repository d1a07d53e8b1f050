"""The losses beside open_clip's: time forward and backward, memory, and distance from the matrix products alone.

    python benchmarks/losses.py            prints tables, writes benchmarks/results/losses.json

InfoNCE beside `open_clip.ClipLoss`, SigLIP beside `open_clip.loss.SigLipLoss`: float32, 512 dimensions, the same
features, one process; "fused" is InfoNCE with compiled tiles (`contrastive.losses.fuse`), which needs a C++ compiler.
Times: all take turns behind a warm-up, medians count. Memory: each in a process of its own,
the peak resident set above what the process held with the features in place. The products that no way of computing the
loss can do without are 2 N^2 D operations forward and 4 N^2 D backward; "x products" is the time over what they take at
the rate at which this machine multiplies such matrices, measured in the same run. Keep the machine idle otherwise.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.loss import SigLipLoss

from contrastive.losses import fuse, infonce, siglip

RESULTS = Path(__file__).resolve().parent / "results" / "losses.json"
DIM = 512
SIZES = (1024, 4096, 8192, 16384)
LARGEST = 65536  # ours alone: the peer would need 64 GiB
LOSSES: dict[str, dict[str, Callable[..., Any]]] = {
    "infonce": {"peer": open_clip.ClipLoss(), "ours": infonce, "fused": infonce},
    "siglip": {"peer": SigLipLoss(), "ours": siglip},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--largest", type=int, default=LARGEST, help="0: leave it out")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-of", nargs=3, metavar=("LOSS", "SYSTEM", "N"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        loss, system, n = arguments.memory_of
        print(json.dumps(memory(loss, system, int(n))))
        return
    rows = []
    for scale in (14.3, 100.0):
        for n in arguments.sizes if scale == 14.3 else [4096]:  # above 70 the logits are shifted: one more operation
            for loss in LOSSES:
                rows.append(compare(loss, n, scale, arguments.rounds))
                print(line(rows[-1]), flush=True)
    largest = [measure_memory(loss, "ours", arguments.largest) for loss in LOSSES if arguments.largest]
    for row in largest:
        print(f"{row['loss']:8} N = {row['n']:,}: {row['seconds']:.1f} s, peak of {row['peak_gib']:.2f} GiB resident")
    document = {"dim": DIM, "threads": torch.get_num_threads(), "rounds": arguments.rounds, "rows": rows}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(document | {"largest": largest}, indent=2) + "\n")


def inputs(n: int, scale: float = 14.3) -> list[torch.Tensor]:
    """Leaves: features of pairs that resemble each other a little, scale and bias."""
    generator = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(n, DIM, generator=generator), dim=1)
    text = F.normalize(image + torch.randn(n, DIM, generator=generator).mul_(2 / DIM**0.5), dim=1)
    leaves = [image, text, torch.tensor(scale), torch.tensor(-10.0)]
    return [leaf.requires_grad_() for leaf in leaves]


def step(call: Callable[..., Any], loss: str, leaves: list[torch.Tensor]) -> float:
    """Seconds of one forward and backward."""
    for leaf in leaves:
        leaf.grad = None
    started = time.perf_counter()
    result = call(*leaves[: 4 if loss == "siglip" else 3])
    (result["loss"] if isinstance(result, dict) else result).backward()
    return time.perf_counter() - started


def compare(loss: str, n: int, scale: float, rounds: int) -> dict[str, Any]:
    """Both systems and the products alone, in turn; then their memory."""
    leaves = inputs(n, scale)
    seconds: dict[str, list[float]] = {system: [] for system in (*LOSSES[loss], "products")}
    for turn in range(rounds + 1):
        for system, call in LOSSES[loss].items():
            fuse(system == "fused")
            took = step(call, loss, leaves)
            if turn:  # the first is the warm-up
                seconds[system].append(took)
        if turn:
            seconds["products"].append(products(n))
    medians = {system: statistics.median(times) for system, times in seconds.items()}
    row = {"loss": loss, "n": n, "scale": scale, **{f"{system}_seconds": value for system, value in medians.items()}}
    row |= {"speedup": medians["peer"] / medians["ours"], "x_products": medians["ours"] / medians["products"]}
    if "fused" in medians:
        row |= {"speedup_fused": medians["peer"] / medians["fused"]}
        row |= {"x_products_fused": medians["fused"] / medians["products"]}
    for system in LOSSES[loss]:
        row[f"{system}_mib"] = measure_memory(loss, system, n)["mib_above_features"]
    return row | {"memory_share": row["ours_mib"] / row["peer_mib"]}


def products(n: int) -> float:
    """Seconds of 2 N^2 D + 4 N^2 D operations at the rate of a product of 2,048 rows, the machine's best here."""
    side = min(n, 2048)
    a, out = torch.randn(side, DIM), torch.empty(side, side)
    started = time.perf_counter()
    repeats = max(3, 4096 // side)
    for _ in range(repeats):
        torch.mm(a, a.T, out=out)
    rate = repeats * 2 * side**2 * DIM / (time.perf_counter() - started)
    return 6 * n**2 * DIM / rate


def measure_memory(loss: str, system: str, n: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--memory-of", loss, system, str(n)]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return found


def memory(loss: str, system: str, n: int) -> dict[str, Any]:
    """The peak resident set of this process, and what of it came on top of the features."""
    fuse(system == "fused")
    small, leaves = inputs(64), inputs(n)
    step(LOSSES[loss][system], loss, small)  # code and thread pools are there
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak counts from here on, not from the imports'
    before = resident_kib("VmRSS")
    seconds = step(LOSSES[loss][system], loss, leaves)
    peak = resident_kib("VmHWM")
    return {"loss": loss, "system": system, "n": n, "seconds": seconds, "peak_gib": peak / 2**20,
            "mib_above_features": (peak - before) / 2**10}  # fmt: skip


def resident_kib(name: str) -> int:
    """VmRSS, the resident set now, or VmHWM, its peak."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0])


def line(row: dict[str, Any]) -> str:
    ratios = f"{row['speedup']:.2f} x as fast, {row['x_products']:.2f} x products"
    if "speedup_fused" in row:
        ratios += f", fused {row['speedup_fused']:.2f} and {row['x_products_fused']:.2f}"
    return (
        f"{row['loss']:8} N = {row['n']:6,}, scale {row['scale']:5.1f}: open_clip {row['peer_seconds']:7.3f} s, "
        f"ours {row['ours_seconds']:7.3f} s ({ratios}); "
        f"above the features {row['peer_mib']:7,.0f} and {row['ours_mib']:5,.0f} MiB ({row['memory_share']:.1%})"
    )


if __name__ == "__main__":
    main()

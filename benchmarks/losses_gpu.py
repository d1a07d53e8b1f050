"""The losses beside open_clip's on a GPU: forward and backward in turn, and the memory above the features.

    python benchmarks/losses_gpu.py        prints a table, writes benchmarks/results/losses_gpu.json

D = 512, float32 features, matrix products in float32 proper and in TF32; medians of 5 turns behind a warm-up. "x
products": over the 6 N² D operations that no way can avoid, at the rate measured in the same run.
"""

import json
import statistics
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss, SigLipLoss

from contrastive.losses import infonce, siglip

RESULTS = Path(__file__).resolve().parent / "results" / "losses_gpu.json"
DIM, TURNS = 512, 5


def main() -> None:
    rows = []
    for tf32 in (False, True):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        for n in (4_096, 16_384, 32_768, 65_536):
            for loss in ("infonce", "siglip"):
                rows.append({"loss": loss, "pairs": n, "tf32": tf32} | compare(loss, n))
                print(rows[-1], flush=True)
    document = {"dim": DIM, "turns": TURNS, "device": torch.cuda.get_device_name(), "torch": torch.__version__}
    RESULTS.write_text(json.dumps(document | {"rows": rows}, indent=1) + "\n")


def compare(loss: str, n: int) -> dict[str, Any]:
    peer = ClipLoss() if loss == "infonce" else SigLipLoss()
    calls = {
        "open_clip": lambda i, t, s, b: peer(i, t, s) if loss == "infonce" else peer(i, t, s, b),
        "ours": lambda i, t, s, b: (infonce if loss == "infonce" else siglip)(i, t, s, b)["loss"],
    }
    if n * n * 4 * 6 > 70e9:  # the peer's logits, their gradients and its copies
        del calls["open_clip"]
    found: dict[str, Any] = {name: {"seconds": [], "mib": 0.0} for name in calls}
    for turn in range(TURNS + 1):
        for name, call in calls.items():
            seconds, mib = step(call, n)
            if turn:
                found[name]["seconds"].append(seconds)
                found[name]["mib"] = max(found[name]["mib"], mib)
    products = 3 * statistics.median(product(n) for _ in range(5))
    result = {f"{name}_seconds": statistics.median(f["seconds"]) for name, f in found.items()}
    result |= {f"{name}_mib": f["mib"] for name, f in found.items()}
    result["x_products"] = result["ours_seconds"] / products
    if "open_clip" in calls:
        result["times_as_fast"] = result["open_clip_seconds"] / result["ours_seconds"]
        result["memory_share"] = result["ours_mib"] / result["open_clip_mib"]
    return result


def step(call: Any, n: int) -> tuple[float, float]:
    generator = torch.Generator("cuda").manual_seed(0)
    image, text = (
        F.normalize(torch.randn(n, DIM, device="cuda", generator=generator), dim=1).requires_grad_() for _ in range(2)
    )
    scale, bias = (torch.tensor(v, device="cuda", requires_grad=True) for v in (14.3, -10.0))
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call(image, text, scale, bias).backward()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3, (torch.cuda.max_memory_allocated() - held) / 2**20


def product(n: int) -> float:
    left, right = (torch.randn(min(n, 16_384), DIM, device="cuda") for _ in range(2))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    left @ right.T
    start.record()
    left @ right.T
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 * (n / len(left)) ** 2


if __name__ == "__main__":
    main()

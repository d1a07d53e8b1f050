"""Images a second through small timm towers, forward and backward, channels-last: which are fast on this machine?

    python benchmarks/image_towers.py            prints a table, writes benchmarks/results/image_towers.json

The towers take turns, five rounds behind a warm-up; the median counts. Keep the machine idle otherwise.
"""

import json
import statistics
import time
from pathlib import Path
from typing import Any

import timm
import torch

RESULTS = Path(__file__).resolve().parent / "results" / "image_towers.json"
BATCH, ROUNDS = 256, 5
NARROW = {"layers": [1, 1, 1, 1], "channels": [32, 64, 128, 256]}
DEEP = {"stem_type": "deep", "stem_width": 16}
TOWERS: list[tuple[str, int, str, dict[str, Any]]] = [
    ("resnet18", 48, "bf16", NARROW),
    ("resnet18", 48, "bf16", NARROW | DEEP),
    ("resnet18", 48, "fp32", NARROW | DEEP),
    ("resnet18", 64, "bf16", NARROW | DEEP),
    ("resnet18", 48, "bf16", NARROW | DEEP | {"channels": [48, 96, 192, 384]}),
    ("resnet10t", 48, "bf16", {}),
    ("regnetx_002", 48, "bf16", {}),
    ("mobilenetv3_small_075", 48, "bf16", {}),
    ("convnext_atto", 64, "bf16", {}),
    ("tf_efficientnet_lite0", 48, "bf16", {}),
]


def main() -> None:
    prepared = []
    for name, size, precision, kwargs in TOWERS:
        tower = timm.create_model(name, num_classes=0, **kwargs).to(memory_format=torch.channels_last).train()
        pixels = torch.randn(BATCH, 3, size, size).to(memory_format=torch.channels_last)
        prepared.append((tower, pixels, precision))
    seconds: list[list[float]] = [[] for _ in prepared]
    for round_number in range(ROUNDS + 1):
        for (tower, pixels, precision), times in zip(prepared, seconds, strict=True):
            started = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                features = tower(pixels)
            features.float().sum().backward()
            if round_number:  # the first is the warm-up
                times.append(time.perf_counter() - started)
    rows = []
    for (name, size, precision, kwargs), times in zip(TOWERS, seconds, strict=True):
        rate = BATCH / statistics.median(times)
        rows.append({"tower": name, "px": size, "precision": precision, "kwargs": kwargs, "images_per_second": rate})
        print(f"{rate:8,.0f} images/s  {name} {size} px {precision} {kwargs or ''}", flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"batch": BATCH, "threads": torch.get_num_threads(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()

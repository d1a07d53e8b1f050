"""What `contrastive plan --gpu here` predicts beside what a step does here: parameters, FLOPs, bytes, memory, seconds.

    python benchmarks/plan.py               beside steps on this machine
    python benchmarks/plan.py --published   the plan of runs whose speed was published, beside that speed

Prints a table and writes its part of benchmarks/results/plan.json. Each case takes two processes of its own: one plans,
one steps on random pairs. Keep the machine idle otherwise; two minutes on two cores.

FLOPs: torch's FlopCounterMode on a real forward and backward of the whole batch, attention as separate products. Saved
bytes: what autograd holds between them, parameters left out. Memory: the peak of the resident set above what it was
before the model was built, against the plan's sum without its reserve. Seconds: the median of five steps behind one.
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
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from contrastive.build import build_accelerator, build_data, build_loss, build_model, wants_training
from contrastive.config import Config, load_config
from contrastive.models import TwoTower, train_tokenizer
from contrastive.plan.recipe import Choices, make_plan
from contrastive.plan.report import as_json
from contrastive.shards import Batch
from contrastive.training import adamw
from contrastive.training.step import TrainStep

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "plan.json"
NO_TRACE = ["track.with=[]", "data.workers=0"]
VIT = ["train.steps=10", "optim.warmup=0", "train.gradient_checkpointing=false"]
CASES = {
    "pictograms, 512 pairs": ("pictograms", NO_TRACE),
    "ViT-B/32, 32 pairs": ("vit-b-32", [*NO_TRACE, *VIT, "train.global_batch=32"]),
    "ViT-B/32, 32 pairs in chunks of 8": ("vit-b-32", [*NO_TRACE, *VIT, "train.global_batch=32", "train.chunk=8"]),
    "ViT-B/32, 32 pairs, checkpointing": ("vit-b-32", [*NO_TRACE, *VIT[:2], "train.global_batch=32"]),
}
ROUNDS = 5
# open_clip on LAION: trained_models_info.csv of github.com/LAION-AI/scaling-laws-openclip (gpus, local_bs,
# samples_per_sec). The file names no card; open_clip's docs/PRETRAINED.md has such runs on A100 of 40 GB (JUWELS
# Booster: four a machine), those of ViT-L/14 with gradient checkpointing.
PUBLISHED = (
    ("ViT-B-32", 128, 256, False, 108844.5704),
    ("ViT-B-16", 344, 256, False, 136370.9084),
    ("ViT-L-14", 768, 112, True, 60327.90558),
    ("ViT-L-14", 396, 224, True, 40026.59493),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", action="store_true")
    parser.add_argument("--part", choices=["plan", "step"], help=argparse.SUPPRESS)  # of a process of its own
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        name, overrides = CASES[arguments.case]
        config = load_config(ROOT / "recipes" / "pretrain" / f"{name}.yaml", overrides)
        print(json.dumps((planned if arguments.part == "plan" else stepped)(config)))
        return
    if arguments.published:
        keep({"published": [published(*run) for run in PUBLISHED]})
        return
    rows, cards = [], {}
    for case in CASES:
        plan, found = (_alone(part, case) for part in ("plan", "step"))
        cards[case] = plan.pop("card")
        for quantity in plan:
            rows.append({"case": case, "quantity": quantity, "planned": plan[quantity], "measured": found[quantity]})
            ratio = plan[quantity] / found[quantity]
            print(f"{case:36}{quantity:24}{plan[quantity]:16,.4f}{found[quantity]:16,.4f}{ratio:8.3f}", flush=True)
    keep({"threads": torch.get_num_threads(), "cards": cards, "rows": rows})


def keep(found: dict[str, Any]) -> None:
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps(results | found, indent=2) + "\n")


def published(model: str, gpus: int, rows: int, checkpointing: bool, measured: float) -> dict[str, Any]:
    """A published run: samples a second and GPU, planned with the command's defaults and measured."""
    overrides = [f"model.name={model}", f"train.global_batch={gpus * rows}", "train.steps=1", "data.train=none"]
    overrides.append(f"train.gradient_checkpointing={str(checkpointing).lower()}")
    config = load_config(ROOT / "recipes" / "pretrain" / "vit-b-32.yaml", [*overrides, "optim.warmup=0"])
    plan = as_json(make_plan(config, Choices(gpus, "a100-40", per_node=4)))
    found = {"model": model, "gpus": gpus, "rows": rows, "checkpointing": checkpointing}
    found |= {"planned": plan["samples_a_second"] / gpus, "measured": measured / gpus}
    found |= {"memory_gib": plan["memory"]["total"] / 2**30, "bound": plan["bound"]}
    print("  ".join(f"{key} {value}" for key, value in found.items()), flush=True)
    return found


def _alone(part: str, case: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--part", part, "--case", case]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=ROOT)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def planned(config: Config) -> dict[str, Any]:
    """The plan's figures of one step on this machine."""
    plan = as_json(make_plan(config, Choices(reserve=0)))
    memory = plan["memory"]
    return {
        "parameters, millions": plan["parameters"]["all"] / 1e6,
        "GFLOPs a sample": plan["flops_a_sample"]["forward_and_backward"] / 1e9,
        "saved bytes, MiB": (memory["activations"] + memory["16-bit copies of weights"]) / 2**20,
        "memory, MiB": memory["total"] / 2**20,
        "seconds a step": plan["seconds"]["step"],
        "card": plan["card"],
    }


def stepped(config: Config) -> dict[str, float]:
    """The same figures of real steps."""
    accelerator = build_accelerator(config)
    choice = wants_training(config)
    trained = ""
    if choice is not None:
        trained = train_tokenizer(build_data(config).captions(), choice.vocab_size, choice.lowercase).to_str()
    before = resident_mib()
    model = build_model(config, trained).train()
    batch = make_batch(model, config.train.global_batch)
    optimizer = adamw(model, lr=1e-5, weight_decay=0.1, betas=(0.9, 0.98), eps=1e-6)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    step = TrainStep(
        accelerator, prepared, build_loss(config, len(batch.keys), {}), optimizer, clip=1.0, chunk=config.train.chunk
    )
    seconds = []
    for _ in range(ROUNDS + 1):
        started = time.perf_counter()
        step(batch, 1.0)
        seconds.append(time.perf_counter() - started)
    memory = peak_mib() - before
    rows = min(config.train.chunk or len(batch.keys), len(batch.keys))
    flops, saved = counted(prepared, batch, rows)
    return {
        "parameters, millions": sum(p.numel() for p in model.parameters()) / 1e6,
        "GFLOPs a sample": flops / rows / 1e9,
        "saved bytes, MiB": saved / 2**20,
        "memory, MiB": memory,
        "seconds a step": statistics.median(seconds[1:]),
    }


def counted(model: Any, batch: Batch, rows: int) -> tuple[float, float]:
    """FLOPs, and bytes saved, of the towers' forward and backward on the first `rows`."""
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    saved: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in own:
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        kept = model(batch.pixels[:rows], batch.tokens[:rows])
    size = sum(saved.values())
    del kept
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        out = model(batch.pixels[:rows], batch.tokens[:rows])
        (out["image"].sum() + out["text"].sum()).backward()
    return float(counter.get_total_flops()), float(size)


def make_batch(model: TwoTower, n: int) -> Batch:
    """Random pixels and captions that fill the context."""
    context, vocabulary = model.tokenizer.context, model.tokenizer.vocab_size
    tokens = torch.randint(1, vocabulary - 1, (n, context))
    tokens[:, -1] = vocabulary - 1  # open_clip's towers pool there
    pixels = torch.randint(0, 256, (n, 3, model.image_size, model.image_size), dtype=torch.uint8)
    number = torch.arange(n)
    valid = torch.ones(n, dtype=torch.bool)
    return Batch(pixels, tokens, ids=number, samples=number, valid=valid, keys=[str(i) for i in range(n)])


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # KiB on Linux


if __name__ == "__main__":
    main()

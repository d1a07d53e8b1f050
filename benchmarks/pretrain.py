"""The same minutes on the same machine and shards: `contrastive train` beside open_clip's trainer.

    python data/pictograms/prepare.py            make the shards, once
    python benchmarks/pretrain.py --search       run each open_clip candidate for two minutes, to choose the best
    python benchmarks/pretrain.py                three systems, seeds 0, 1, 2, six minutes each, interleaved
    python benchmarks/pretrain.py --only open_clip-vit192 --seed 0 --minutes 1
    python benchmarks/pretrain.py --collect      the table and the JSON of the runs that are there
    python benchmarks/pretrain.py --list

Keep the machine idle otherwise. Every finished run is kept under runs/benchmark-pretrain/ and not repeated as
long as its definition stays the same, so the script can be stopped and started again. The table that it
prints goes to benchmarks/results/pretrain.json with every run in it.

The figure: zero-shot accuracy among the 1,888 distinct captions of the validation shards, a drawing style
that is not in the training set. Both sides embed the images with their own evaluation transform and the bare
captions with their own tokenizer; one function, `accuracy`, ranks. Only training is timed, from the first
batch on: no start-up, no validation, no saving. Both sides' learning rates follow the clock (for open_clip
see open_clip_timed.py).

Systems
    ours                  recipes/pretrain/pictograms.yaml
    open_clip-our-towers  the recipe, optimizer included, as far as open_clip has words for it; `--list` says
                          for what it has none
    open_clip-best        the best of the candidates below by `--search`; without a search the first of them

open_clip 3.3 needs webdataset 0.2.86 to train. It gets it in a folder of its own, .venv-peer, in front of the
other packages; the script fills it on first use:
    pip install --target .venv-peer --no-deps webdataset==0.2.86
"""

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from open_clip_timed import validation_pairs

ROOT = Path(__file__).resolve().parent.parent
RECIPE = "recipes/pretrain/pictograms.yaml"
TRAIN, VALIDATION = "data/pictograms/shards/train", "data/pictograms/shards/val"
WORK = ROOT / "runs" / "benchmark-pretrain"
RESULTS = ROOT / "benchmarks" / "results" / "pretrain.json"
PEER_PACKAGES = ROOT / ".venv-peer"
SMALL_VOCABULARY = 8000
TOKENIZER = WORK.relative_to(ROOT) / "tokenizer"  # relative, as results are published; runs start in ROOT


def candidate(
    vision: dict[str, Any],
    text: dict[str, Any],
    *,
    dim: int = 256,
    batch: int = 256,
    lr: float = 1e-3,
    wd: float = 0.1,
    crop: tuple[float, float] = (0.5, 1.0),
    warmup: float = 0.05,
    workers: int = 1,
    more: tuple[str, ...] = (),
) -> dict[str, Any]:
    """One set-up of open_clip: its model configuration and its trainer's options."""
    return {
        "model": {"embed_dim": dim, "vision_cfg": vision, "text_cfg": text},
        "warmup": warmup,
        "arguments": [
            "--batch-size", str(batch), "--workers", str(workers), "--precision", "amp_bf16",
            "--lr", str(lr), "--wd", str(wd), "--beta1", "0.9", "--beta2", "0.98", "--eps", "1e-8",
            "--grad-clip-norm", "1.0", "--aug-cfg", f"scale={tuple(crop)}", *more,
        ],
    }  # fmt: skip


def timm(name: str, size: int) -> dict[str, Any]:
    return {"timm_model_name": name, "timm_pool": "avg", "timm_proj": "linear", "image_size": size}


def clip_text(width: int, layers: int, context: int) -> dict[str, Any]:
    """A text tower on CLIP's own vocabulary of 49,408."""
    return {"context_length": context, "width": width, "heads": max(1, width // 64), "layers": layers}


def small_text(width: int, layers: int, context: int) -> dict[str, Any]:
    """A text tower on a vocabulary trained on the captions; to open_clip it is a Hugging Face tokenizer."""
    vocabulary = {"hf_tokenizer_name": str(TOKENIZER), "vocab_size": SMALL_VOCABULARY}
    return clip_text(width, layers, context) | vocabulary | {"pool_type": "eos", "eos_id": 1, "pad_id": 0}


VIT192 = {"image_size": 64, "layers": 6, "width": 192, "head_width": 64, "patch_size": 8}

# What was tried to serve open_clip best. A context of 16 cuts 4 of the 22,635 captions.
CANDIDATES = {
    "resnet18-48-clip-vocabulary": candidate(timm("resnet18", 48), clip_text(256, 1, 16)),
    "resnet18-48-small-vocabulary": candidate(timm("resnet18", 48), small_text(256, 1, 16)),
    "resnet18-48-batch512": candidate(timm("resnet18", 48), small_text(256, 1, 16), batch=512),
    "resnet18-64": candidate(timm("resnet18", 64), small_text(256, 1, 16)),
    "resnet10t-48": candidate(timm("resnet10t", 48), small_text(256, 1, 16)),
    "resnet10t-64": candidate(timm("resnet10t", 64), small_text(256, 1, 16)),
    "resnet10t-48-lr2e-3": candidate(timm("resnet10t", 48), small_text(256, 1, 16), batch=512, lr=2e-3),
    "resnet10t-48-mild-crop": candidate(timm("resnet10t", 48), small_text(256, 1, 16), crop=(0.9, 1.0)),
    "regnetx002-48": candidate(timm("regnetx_002", 48), small_text(256, 1, 16), batch=512, lr=2e-3),
    "convnext-atto-64": candidate(timm("convnext_atto", 64), small_text(128, 1, 16)),
    "vit192": candidate(VIT192, clip_text(192, 4, 77), lr=5e-4),
    "vit192-short-text": candidate(VIT192, small_text(192, 1, 16), lr=5e-4),
}


def our_towers() -> tuple[dict[str, Any], list[str]]:
    """The recipe in open_clip's words, and what of it there are no words for."""
    from contrastive.config import load_config

    config = load_config(ROOT / RECIPE)
    image, text, tokenizer = config.model.image, config.model.text, config.model.tokenizer
    augment, optim = config.data.augment, config.optim
    lost = []
    if config.loss.same_caption != "negative":
        lost.append("equal captions in one batch stay each other's negatives (loss.same_caption)")
    if image.kwargs:
        lost.append(f"timm's keywords {dict(image.kwargs)}")
    if text.pool != "end":
        lost.append(f"text pool {text.pool!r}, two-sided attention: a causal tower's end token instead")
    if text.depth == 0:
        lost.append("text depth 0, an average of word embeddings: one layer instead")
    neutral = {"flip": 0.0, "rotate": 0.0, "color": 0.0, "grayscale": 0.0, "tint": 0.0}
    if changed := [key for key, off in neutral.items() if getattr(augment, key) != off]:
        lost.append(f"augmentation by {', '.join(changed)}")
    if config.data.caption_variants:
        lost.append("further captions of a sample (data.caption_variants)")
    if config.data.cache == "pixels":
        lost.append("pixels decoded once (data.cache)")
    trained = tokenizer.kind == "trained"
    if trained and tokenizer.vocab_size != SMALL_VOCABULARY:
        lost.append(f"a vocabulary of {tokenizer.vocab_size}: {SMALL_VOCABULARY} here")
    tower = (small_text if trained else clip_text)(text.width, max(1, text.depth), tokenizer.context)
    tower["heads"] = text.heads
    warmup = float(optim.warmup[:-1]) / 100 if isinstance(optim.warmup, str) else 0.05
    mean, std = ([str(x) for x in values] for values in (image.mean, image.std))
    system = candidate(
        timm(image.name, image.size),
        tower,
        dim=config.model.dim,
        batch=config.train.global_batch,
        lr=optim.lr,
        wd=optim.weight_decay,
        crop=augment.crop,
        warmup=warmup,
        more=("--image-mean", *mean, "--image-std", *std),
    )
    return system, lost


def systems(search_minutes: float) -> dict[str, dict[str, Any]]:
    """What can be run, by name; a definition holds everything that would make a kept run stale."""
    lines = (ROOT / RECIPE).read_text().splitlines()
    recipe = "\n".join(line for line in lines if not line.startswith("#"))
    tried = {f"open_clip-{name}": system for name, system in CANDIDATES.items()}
    scores = {name: run["top1"] for name in tried if (run := kept(name, tried[name], 0, search_minutes))}
    best = max(scores, key=lambda name: scores[name]) if scores else next(iter(tried))
    return {
        "ours": {"recipe": recipe},
        "open_clip-our-towers": our_towers()[0],
        "open_clip-best": tried[best] | {"is": best},
        **tried,
    }


def run_folder(name: str, seed: int, minutes: float) -> Path:
    return WORK / f"{name}-{minutes:g}min-seed{seed}"


def fingerprint(definition: dict[str, Any]) -> str:
    plain = {key: value for key, value in definition.items() if key != "is"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def kept(name: str, definition: dict[str, Any], seed: int, minutes: float) -> dict[str, Any] | None:
    """The result of an earlier run of this very definition."""
    path = run_folder(name, seed, minutes) / "result.json"
    if not path.exists():
        return None
    result: dict[str, Any] = json.loads(path.read_text())
    return result if result["fingerprint"] == fingerprint(definition) else None


def run_one(name: str, definition: dict[str, Any], seed: int, minutes: float) -> dict[str, Any]:
    """Train and evaluate one system, or return what an earlier run of it gave."""
    name = definition.get("is", name)  # open_clip-best shares the runs of the candidate that it is
    if result := kept(name, definition, seed, minutes):
        return result
    folder = run_folder(name, seed, minutes)
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{name}, seed {seed}, {minutes:g} minutes: log in {folder / 'log.txt'}", flush=True)
    load, start = os.getloadavg()[0], time.monotonic()
    run = run_ours if name == "ours" else run_open_clip
    result = run(definition, folder, seed, minutes) | {
        "system": name,
        "seed": seed,
        "minutes": minutes,
        "wall_seconds": time.monotonic() - start,
        "load_before": load,
        "fingerprint": fingerprint(definition),
    }
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


def call(command: list[str], folder: Path, packages: list[Path]) -> None:
    path = os.pathsep.join([*map(str, packages), *filter(None, [os.environ.get("PYTHONPATH")])])
    with open(folder / "log.txt", "w") as log:
        environment = os.environ | {"PYTHONPATH": path}
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
    if done.returncode:
        tail = "\n".join((folder / "log.txt").read_text().splitlines()[-15:])
        raise SystemExit(f"{' '.join(command)} exited with {done.returncode}:\n{tail}")


def run_ours(definition: dict[str, Any], folder: Path, seed: int, minutes: float) -> dict[str, Any]:
    import torch

    import contrastive

    overrides = [f"run.seed={seed}", f"run.dir={folder / 'run'}", f"train.minutes={minutes}"]
    # the evaluation on other data comes after training and is not this benchmark's business
    overrides += ["eval.labelled=[]", "eval.report=false"]
    call([sys.executable, "-m", "contrastive", "train", RECIPE, *overrides, "--overwrite"], folder, [ROOT])
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "train/samples" in row][-1]

    model = contrastive.load(folder / "run")
    images, captions = validation_pairs(ROOT / VALIDATION)
    image, text = [], []
    with torch.no_grad():
        for start in range(0, len(images), 256):
            pixels = torch.stack([model.preprocess(x) for x in images[start : start + 256]])
            tokens = model.tokenize(captions[start : start + 256])
            image.append(model.encode_image(pixels.to(model.device)).cpu().numpy())
            text.append(model.encode_text(tokens.to(model.device)).cpu().numpy())
    return accuracy(np.concatenate(image), np.concatenate(text), captions) | {
        "samples": int(last["train/samples"]),
        "seconds": last["train/seconds"],
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def run_open_clip(definition: dict[str, Any], folder: Path, seed: int, minutes: float) -> dict[str, Any]:
    prepare_peer()
    models = folder / "models"
    models.mkdir(exist_ok=True)
    (models / "peer.json").write_text(json.dumps(definition["model"], indent=2) + "\n")
    shards = sorted((ROOT / TRAIN).glob("*.tar"))
    job = {
        "models": str(models),
        "seconds": 60 * minutes,
        "warmup": definition["warmup"],
        "validation": str(ROOT / VALIDATION),
        "output": str(folder / "features.npz"),
        "arguments": [
            "--model", "peer", "--seed", str(seed), "--dataset-type", "webdataset",
            "--train-data", str(ROOT / TRAIN / f"{{{shards[0].stem}..{shards[-1].stem}}}.tar"),
            "--train-num-samples", str(train_pairs()), "--epochs", "1000000", "--save-frequency", "0",
            "--logs", str(folder / "logs"), "--name", str(time.time_ns()), "--log-every-n-steps", "20",
            *definition["arguments"],
        ],
    }  # fmt: skip
    (folder / "job.json").write_text(json.dumps(job, indent=2) + "\n")
    timed = str(ROOT / "benchmarks" / "open_clip_timed.py")
    call([sys.executable, timed, str(folder / "job.json")], folder, [PEER_PACKAGES])
    found = np.load(folder / "features.npz")
    _, captions = validation_pairs(ROOT / VALIDATION)
    batch = int(definition["arguments"][definition["arguments"].index("--batch-size") + 1])
    return accuracy(found["image"], found["text"], captions) | {
        "samples": int(found["steps"]) * batch,
        "seconds": float(found["seconds"]),
        "parameters": int(found["parameters"]),
    }


def prepare_peer() -> None:
    """The packages that open_clip's trainer wants, and a tokenizer of the captions that it can read."""
    if not (PEER_PACKAGES / "webdataset").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(PEER_PACKAGES)]
        subprocess.run([*pip, "--no-deps", "webdataset==0.2.86"], check=True)
        if missing := [name for name in ("pandas", "braceexpand") if not importlib.util.find_spec(name)]:
            subprocess.run([*pip, *missing], check=True)
    if not (ROOT / TOKENIZER / "tokenizer.json").exists():
        from transformers import PreTrainedTokenizerFast

        from contrastive.models import train_tokenizer
        from contrastive.shards import open_index

        trained = train_tokenizer(open_index(ROOT / TRAIN).captions(), vocab_size=SMALL_VOCABULARY)
        folder = PreTrainedTokenizerFast(tokenizer_object=trained, pad_token="[PAD]", eos_token="[END]")
        folder.save_pretrained(ROOT / TOKENIZER)


def accuracy(image: np.ndarray, text: np.ndarray, captions: list[str]) -> dict[str, float]:
    """Zero-shot top-1 and top-5 of each image among the distinct captions.

    A caption that scores as high as the right one counts as better, so that equal features cannot win.
    """
    names = sorted(set(captions))
    place = {name: i for i, name in enumerate(names)}
    target = np.array([place[caption] for caption in captions])
    classes = np.zeros((len(names), text.shape[1]))
    classes[target] = text  # equal captions have equal features
    scores = image.astype(np.float64) @ classes.T
    own = scores[np.arange(len(target)), target]
    rank = (scores >= own[:, None]).sum(axis=1) - 1
    return {"top1": float((rank < 1).mean()), "top5": float((rank < 5).mean()), "classes": len(names)}


def train_pairs() -> int:
    return int(json.loads((ROOT / TRAIN / "manifest.json").read_text())["pairs"])


def machine() -> dict[str, Any]:
    names = [line.partition(":")[2].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "timm", "open_clip_torch")},
    }


def table(runs: list[dict[str, Any]]) -> str:
    row = "{:45s} {:>5} {:>16s} {:>16s} {:>8} {:>7} {:>7}"
    lines = [row.format("system", "seeds", "top-1 %", "top-5 %", "pairs/s", "passes", "M par.")]
    for name in dict.fromkeys(run["shown_as"] for run in runs):
        own = [run for run in runs if run["shown_as"] == name]
        spread = []
        for key in ("top1", "top5"):
            values = [100 * run[key] for run in own]
            spread.append(f"{np.mean(values):5.1f} ({min(values):.1f}-{max(values):.1f})")
        rate = np.mean([run["samples"] / run["seconds"] for run in own])
        passes = np.mean([run["samples"] for run in own]) / train_pairs()
        size = own[0]["parameters"] / 1e6
        lines.append(row.format(name, len(own), *spread, f"{rate:.0f}", f"{passes:.1f}", f"{size:.1f}"))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=6.0, help="of training, for each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seed", type=int, help="the only seed")
    parser.add_argument("--only", metavar="NAME", help="run this system alone and write no pretrain.json")
    parser.add_argument(
        "--search", nargs="*", metavar="CANDIDATE", help="run these (or all) open_clip candidates with seed 0"
    )
    parser.add_argument("--search-minutes", type=float, default=2.0, help="of training, for each candidate")
    parser.add_argument("--collect", action="store_true", help="run nothing: report the runs that are kept")
    parser.add_argument("--list", action="store_true", help="names, and what open_clip cannot express")
    args = parser.parse_args()

    if not (ROOT / TRAIN / "manifest.json").exists():
        raise SystemExit(f"{TRAIN} is missing; make it with `python data/pictograms/prepare.py`")
    known = systems(args.search_minutes)
    minutes = args.minutes if args.search is None else args.search_minutes
    if args.list:
        print(*known, "open_clip-our-towers lacks:", sep="\n")
        print(*our_towers()[1], sep="\n")
        return
    candidates = [f"open_clip-{name}" for name in CANDIDATES]
    names = ["ours", "open_clip-our-towers", "open_clip-best"]
    seeds = args.seeds if args.seed is None else [args.seed]
    if args.search is not None:
        names, seeds = [f"open_clip-{name}" for name in args.search] or candidates, [0]
        if wrong := [name for name in names if name not in candidates]:
            raise SystemExit(f"--search: no candidate {', '.join(wrong)}; `--list` names them")
    if args.only:
        if args.only not in known:
            raise SystemExit(f"--only {args.only}: choose one of {', '.join(known)}")
        names = [args.only]

    runs = []
    for seed in seeds:  # interleaved: a machine that gets slower gets slower for all
        for name in names:
            if args.collect:
                result = kept(str(known[name].get("is", name)), known[name], seed, minutes)
                if result is None:
                    print(f"{name}, seed {seed}: not run yet")
                    continue
            else:
                result = run_one(name, known[name], seed, minutes)
            same = result["system"] == name
            shown = name if same else f"{name} ({result['system'].removeprefix('open_clip-')})"
            runs.append(result | {"shown_as": shown})
            print(f"  top-1 {100 * result['top1']:.1f} %  top-5 {100 * result['top5']:.1f} %", flush=True)
    print(table(runs))
    if args.search is not None or args.only:
        return
    tried = [run for name in candidates if (run := kept(name, known[name], 0, args.search_minutes))]
    report = {
        "machine": machine(),
        "minutes": args.minutes,
        "search_minutes": args.search_minutes,
        "runs": runs,
        "tried": tried,
        "not_expressed": our_towers()[1],
        "definitions": {name: known[name] for name in [*names, *(run["system"] for run in tried)]},
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {RESULTS.relative_to(ROOT)}")


if __name__ == "__main__":
    main()

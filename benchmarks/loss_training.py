"""The pictograms recipe with each loss, shortened, three seeds: zero-shot accuracy on the validation style.

    python data/pictograms/prepare.py
    python benchmarks/loss_training.py        prints a table, writes benchmarks/results/loss_training.json

Everything but the loss, its bias and its starting scale, the length and the size of the images (32 px) is that of
recipes/pretrain/pictograms.yaml, tuned for InfoNCE; no loss was tuned for this. Lengths are in epochs, so that the
results do not depend on what else the machine does. What is there already is not run again (delete runs/loss-training
to begin anew).
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "loss_training.json"
RUNS = ROOT / "runs" / "loss-training"
EPOCHS, SEEDS = 5, (0, 1, 2)
TEACHER_EPOCHS = 12  # InfoNCE, seed 100
SHORT = [
    "model.image.size=32",
    "eval.labelled=[]",
    "eval.every=null",
    "eval.report=false",
    "checkpoint.every=null",
    "track.with=[]",
]
SIGMOID = ["model.logit_bias=-10.0", "model.logit_scale.init=10.0"]
DISTILLED = f"{{kind: distillation, teacher: {RUNS / 'teacher'}}}"
LOSSES: dict[str, list[str]] = {
    "infonce, same captions ignored": ["loss={kind: infonce, same_caption: ignore}"],
    "infonce, same captions negatives": ["loss={kind: infonce, same_caption: negative}"],
    "infonce, same captions positives": ["loss={kind: infonce, same_caption: positive}"],
    "dcl, ignored": ["loss={kind: dcl, same_caption: ignore}"],
    "siglip, ignored": ["loss={kind: siglip, same_caption: ignore}", *SIGMOID],
    "siglip, negatives": ["loss={kind: siglip, same_caption: negative}", *SIGMOID],
    "margin, sum, ignored": ["loss={kind: margin, negatives: sum}"],
    "margin, hardest behind 60 steps of warm-up, ignored": [
        "loss={kind: margin, negatives: hardest, warmup_steps: 60}"
    ],
    "margin, semi-hard, ignored": ["loss={kind: margin, negatives: semi-hard}"],
    "infonce + cyclip, ignored": ["loss=[{kind: infonce}, {kind: cyclip}]"],
    "infonce + 0.02 cyclip, ignored": ["loss=[{kind: infonce}, {kind: cyclip, weight: 0.02}]"],
    "sogclr, gamma 0.9, ignored": ["loss={kind: sogclr, gamma: 0.9}"],
    "fastclip (sogclr, rho 6.5), ignored": ["loss={kind: sogclr, gamma: 0.9, rho: 6.5}"],
    "distillation from 12 epochs of infonce": [f"loss={DISTILLED}"],
    "infonce + distillation": [f"loss=[{{kind: infonce}}, {DISTILLED}]"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="torch threads of a run")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="only these; nothing is written")
    arguments = parser.parse_args()
    extra = [] if arguments.threads is None else [f"train.threads={arguments.threads}"]
    train(RUNS / "teacher", [f"train.epochs={TEACHER_EPOCHS}", "run.seed=100", *extra])
    found: dict[str, list[dict[str, float]]] = {name: [] for name in LOSSES}
    for seed in arguments.seeds:  # a seed of every loss before the next, so that an early end leaves a fair table
        for name, overrides in LOSSES.items():
            folder = RUNS / f"{name.replace(' ', '-').replace(',', '').replace('/', '-')}-{seed}"
            found[name].append(train(folder, [f"train.epochs={EPOCHS}", f"run.seed={seed}", *overrides, *extra]))
    print_table(found)
    if arguments.seeds == list(SEEDS):
        save(found)


def train(folder: Path, overrides: list[str]) -> dict[str, float]:
    """One run, if it is not there yet; its shares on the validation style."""
    if not (folder / "results.json").exists():
        command = [sys.executable, "-m", "contrastive", "train", "recipes/pretrain/pictograms.yaml", "--overwrite"]
        command += [f"run.dir={folder}", *SHORT, *overrides]
        finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if finished.returncode:
            raise SystemExit(f"{' '.join(command)}\n{finished.stderr[-2000:]}")
    *_, trained, validated = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    shares = {name: validated[f"validation/zeroshot/{name}"] for name in ("top1", "top5")}
    print(f"{shares['top1']:6.1%} {shares['top5']:6.1%}  {folder.name}", flush=True)
    return shares | {"train_loss": trained["train/loss"], "seconds": trained["train/seconds"]}


def save(found: dict[str, list[dict[str, float]]]) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    document = {"epochs": EPOCHS, "seeds": list(SEEDS), "teacher_epochs": TEACHER_EPOCHS, "losses": found}
    RESULTS.write_text(json.dumps(document, indent=2) + "\n")


def print_table(found: dict[str, list[dict[str, float]]]) -> None:
    print("| loss | top-1, % (range) | top-5, % |\n|---|---|---|")
    for name, runs in found.items():
        top1, top5 = ([100 * run[key] for run in runs] for key in ("top1", "top5"))
        mean1, mean5 = statistics.mean(top1), statistics.mean(top5)
        print(f"| {name} | {mean1:.1f} ({min(top1):.1f} - {max(top1):.1f}) | {mean5:.1f} |")


if __name__ == "__main__":
    main()

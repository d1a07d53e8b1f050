"""A real run that is killed again and again, beside the same run left alone: weights, losses and places must be equal.

    python benchmarks/chaos.py                  writes benchmarks/results/chaos.json; some ten minutes on two cores

Pictograms, two gloo processes, 400 steps of 64 pairs. A supervisor starts the run with --auto-resume, waits
until it has gone on by a random number of steps, and kills both processes (SIGKILL) at a random moment after that,
20 times; then it lets it end. Checkpoints are written every 10 steps in the background, so that kills hit saves too.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results" / "chaos.json"
OVERRIDES = [
    "train.minutes=null", "train.global_batch=64", "train.precision=fp32", "checkpoint.every=10", "eval.every=null",
    "data.validation=null", "eval.labelled=[]", "eval.report=false", "track.log_every=1", "track.with=[]",
    "data.workers=1", "train.threads=1", "data.augment.crop=[0.5, 1.0]",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "chaos")
    arguments = parser.parse_args()
    shutil.rmtree(arguments.folder, ignore_errors=True)
    undisturbed, killed = arguments.folder / "undisturbed", arguments.folder / "killed"
    draw = random.Random(arguments.seed)
    started = time.monotonic()
    run = start(undisturbed, arguments.steps)
    assert wait(run) == [0, 0], "the undisturbed run failed"
    seconds = {"undisturbed": time.monotonic() - started}
    started = time.monotonic()
    at: list[int] = []
    while len(at) < arguments.kills:
        run = start(killed, arguments.steps)
        before = newest(killed)
        target = before + draw.randint(3, max(4, 2 * (arguments.steps - before) // (arguments.kills - len(at) + 1)))
        while newest(killed) < min(target, arguments.steps - 1) and all(p.poll() is None for p in run):
            time.sleep(0.01)
        time.sleep(draw.random() * 0.2)
        for process in run:
            process.send_signal(signal.SIGKILL)
        codes = wait(run)
        if -signal.SIGKILL in codes:
            at.append(newest(killed))
            print(f"kill {len(at)} behind step {at[-1]}", flush=True)
        else:
            break
    run = start(killed, arguments.steps)
    codes = wait(run)
    seconds["killed"] = time.monotonic() - started
    weights, expected = (load_file(folder / "run" / "model" / "model.safetensors") for folder in (killed, undisturbed))
    losses, wanted = ({row["step"]: row["train/loss"] for row in rows(folder)} for folder in (killed, undisturbed))
    document = {
        "steps": arguments.steps, "kills": len(at), "killed_behind_steps": at, "exit_codes": codes, "seconds": seconds,
        "weights_equal_bit_for_bit": all(torch.equal(weights[key], expected[key]) for key in expected),
        "tensors": len(expected), "losses_equal_at_every_step": losses == wanted, "losses": len(wanted),
    }  # fmt: skip
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document, indent=1))
    sys.exit(not (document["weights_equal_bit_for_bit"] and document["losses_equal_at_every_step"]))


def start(folder: Path, steps: int) -> list[subprocess.Popen]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, "-m", "contrastive", "train", "pretrain/pictograms", f"run.dir={folder / 'run'}",
        f"train.steps={steps}", *OVERRIDES, "--auto-resume",
    ]  # fmt: skip
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    processes = []
    for rank in ("0", "1"):
        environment = os.environ | place | {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"}
        log = (folder / f"log-{rank}.txt").open("ab")
        processes.append(subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log))
    return processes


def wait(run: list[subprocess.Popen]) -> list[int]:
    return [process.wait(timeout=900) for process in run]


def rows(folder: Path) -> list[dict]:
    path = folder / "run" / "metrics.jsonl"
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:  # being written
            continue
        if "train/loss" in row:
            found.append(row)
    return found


def newest(folder: Path) -> int:
    return max((row["step"] for row in rows(folder)), default=0)


if __name__ == "__main__":
    main()

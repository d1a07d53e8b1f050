"""What a checkpoint costs: the step's stall, and the time until it is on the disk, beside others' ways of saving.

    python benchmarks/checkpoint.py             prints a table, writes benchmarks/results/checkpoint.json

A ViT-S/32 image tower and a text tower of 12 layers (with AdamW's moments, three numbers a weight) are saved in turn:
"stall" is what training waits for: `take_snapshot`, and, behind a forward and a backward pass of 16 pairs, what is left
of the copy that goes on meanwhile (from the second save on); "copy" is all of the copy, made at once; "whole" the time
until a committed checkpoint is there (copy, are the weights finite?, SHA-256 of every file, fsync of files and folders,
rename). "step" is these two passes alone, "step, saving" the same with the stall and with all that is written beside
them, on the same cores. `torch.save` writes one file of the same state and syncs it, accelerate's `save_state` writes
its folder (its files are synced here too, for a fair end), "disk" writes as many bytes from memory into one file and
syncs it. Medians. The folder lies where `--folder` says. Keep the machine idle.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import open_clip
import torch
from accelerate import Accelerator

from contrastive.training import adamw
from contrastive.training.checkpoint import Snapshot, take_snapshot, write_checkpoint
from contrastive.training.saver import Saver

RESULTS = Path(__file__).resolve().parent / "results" / "checkpoint.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("build"))
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    root = Path(tempfile.mkdtemp(dir=arguments.folder))
    accelerator = Accelerator(cpu=True)
    model = open_clip.create_model("ViT-S-32")
    optimizer = adamw(model, lr=1e-4, weight_decay=0.1, betas=(0.9, 0.98), eps=1e-8)
    model, optimizer = accelerator.prepare(model, optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    state = {"step": 1}
    size = sum(
        t.numel() * t.element_size() for files in _tensors(accelerator, model, optimizer) for t in files.values()
    )
    noise = os.urandom(1 << 24)

    spare = take_snapshot(accelerator, model, optimizer, None, state)  # a run's first save finds none

    def snapshot() -> Snapshot:
        return take_snapshot(accelerator, model, optimizer, None, state, spare)

    images, texts = torch.randn(16, 3, 224, 224), torch.randint(1, 40_000, (16, 77))

    def step() -> None:
        image, text, scale = model(images, texts)
        torch.nn.functional.cross_entropy(scale * image @ text.T, torch.arange(16)).backward()

    saver, stalls = Saver(root / "saver", keep=1), []

    def step_saving() -> None:
        started = time.perf_counter()
        saver.save(snapshot())
        between = time.perf_counter()
        step()
        done = time.perf_counter()
        saver.wait_until_copied()
        stalls.append(time.perf_counter() - done + between - started)

    def copy() -> None:
        snapshot().copy_rest()

    def whole() -> None:
        taken = snapshot()
        taken.copy_rest()
        assert taken.not_finite() is None
        write_checkpoint(root / "ours", taken)

    def torch_save() -> None:
        with open(root / "torch.pt", "wb") as file:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
            file.flush()
            os.fsync(file.fileno())

    def save_state() -> None:
        accelerator.save_state(str(root / "accelerate"))
        for path in (root / "accelerate").rglob("*"):
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())

    def disk() -> None:
        with open(root / "disk", "wb", buffering=0) as file:
            for _ in range(size // len(noise)):
                file.write(noise)
            os.fsync(file.fileno())

    ways: dict[str, Callable[[], object]] = {
        "step": step, "step, saving": step_saving, "copy": copy, "whole": whole,
        "torch.save": torch_save, "save_state": save_state, "disk": disk,
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(arguments.turns + 1):
        for name, call in ways.items():
            for left in root.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            os.sync()
            started = time.perf_counter()
            call()
            if turn:
                seconds[name].append(time.perf_counter() - started)
            saver.finish()
            assert saver.failed is None
    shutil.rmtree(root)
    seconds["stall"] = stalls[1:]
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    document = {
        "mb": size / 1e6, "turns": arguments.turns, "seconds": medians,
        "stall_of_whole": medians["stall"] / medians["whole"],
        "copy_of_whole": medians["copy"] / medians["whole"],
        "whole_of_disk": medians["whole"] / medians["disk"],
        "whole_of_torch_save": medians["whole"] / medians["torch.save"],
        "whole_of_save_state": medians["whole"] / medians["save_state"],
    }  # fmt: skip
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")
    print(f"{size / 1e6:,.0f} MB")
    for name, taken in medians.items():
        print(f"{name:12} {taken:6.3f} s", end="")
        if name not in ("step", "step, saving", "stall"):
            print(f"  {size / 1e6 / taken:7,.0f} MB/s  {taken / medians['disk']:5.2f} x the disk's", end="")
        print()
    print(f"the stall is {document['stall_of_whole']:.1%} of a save that training waits for")


def _tensors(accelerator: Accelerator, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list:
    return list(take_snapshot(accelerator, model, optimizer, None, {"step": 1}).tensors.values())


if __name__ == "__main__":
    main()

"""Run open_clip's trainer for a given time, then embed the validation pairs with what it has trained.

    python benchmarks/open_clip_timed.py JOB.json

The trainer counts epochs. So that it gets exactly the seconds that the other side gets, and a whole
learning-rate schedule in them, its cosine is made to follow the clock, which starts when its first batch is
there and ends the training at the limit. Nothing else of it is changed. The job, by pretrain.py:

    models      folder of model configurations (JSON) to register, beside the built-in ones
    arguments   of `python -m open_clip_train.main`
    seconds     of training; warmup: share of them
    validation  folder of tar shards with key.webp and key.txt
    output      NPZ to write: image and text features, seconds, steps
"""

import argparse
import io
import json
import math
import sys
import tarfile
import time
from pathlib import Path
from typing import Any


class TimeIsUp(Exception):
    """Training has had its seconds."""


def validation_pairs(folder: str | Path) -> tuple[list[Any], list[str]]:
    """The images (RGB) and captions of a folder of tar shards, in order."""
    from PIL import Image

    images, captions = [], []
    for shard in sorted(Path(folder).glob("*.tar")):
        with tarfile.open(shard) as tar:
            members = {member.name: member for member in tar}
            for name in sorted(members):
                if name.endswith(".webp"):
                    images.append(Image.open(io.BytesIO(tar.extractfile(members[name]).read())).convert("RGB"))
                    text = members[name.removesuffix(".webp") + ".txt"]
                    captions.append(tar.extractfile(text).read().decode().strip())
    return images, captions


def train(job: dict[str, Any]) -> dict[str, Any]:
    """Train until the time is up; the model, its transform, and how far it came."""
    import open_clip
    import open_clip_train.main as trainer

    open_clip.add_model_config(Path(job["models"]))
    state: dict[str, Any] = {"steps": 0}

    def clocked_cosine(optimizer: Any, base_lr: float, warmup_length: int, steps: int) -> Any:
        def adjust(step: int) -> None:
            state.setdefault("start", time.monotonic())
            seconds = time.monotonic() - state["start"]
            share = seconds / job["seconds"]
            if share >= 1:
                state.update(steps=step, seconds=seconds)
                raise TimeIsUp
            if share < job["warmup"]:
                factor = max(share, 1e-3) / job["warmup"]
            else:
                factor = 0.5 * (1 + math.cos(math.pi * (share - job["warmup"]) / (1 - job["warmup"])))
            for group in optimizer.param_groups:
                group["lr"] = factor * base_lr

        return adjust

    create = trainer.create_model_and_transforms

    def remember(*args: Any, **kwargs: Any) -> Any:
        state["model"], train_transform, state["transform"] = create(*args, **kwargs)
        return state["model"], train_transform, state["transform"]

    trainer.cosine_lr, trainer.create_model_and_transforms = clocked_cosine, remember
    try:
        trainer.main(job["arguments"])
    except TimeIsUp:
        return state
    raise SystemExit("the trainer ended before its time: it ran out of epochs, or refused its arguments")


def embed(job: dict[str, Any], state: dict[str, Any]) -> None:
    """Write the features of the validation pairs, by the model's own evaluation transform and tokenizer."""
    import numpy as np
    import open_clip
    import torch

    model = state["model"].eval()
    options = argparse.ArgumentParser()
    options.add_argument("--model")
    tokenizer = open_clip.get_tokenizer(options.parse_known_args(job["arguments"])[0].model)
    images, captions = validation_pairs(job["validation"])
    device = next(model.parameters()).device
    image, text = [], []
    with torch.no_grad():
        for start in range(0, len(images), 256):
            pixels = torch.stack([state["transform"](x) for x in images[start : start + 256]]).to(device)
            tokens = tokenizer(captions[start : start + 256]).to(device)
            image.append(model.encode_image(pixels, normalize=True).float().cpu().numpy())
            text.append(model.encode_text(tokens, normalize=True).float().cpu().numpy())
    np.savez(
        job["output"],
        image=np.concatenate(image),
        text=np.concatenate(text),
        seconds=state["seconds"],
        steps=state["steps"],
        parameters=sum(p.numel() for p in model.parameters()),
    )


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    embed(job, train(job))

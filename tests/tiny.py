"""A corpus of coloured squares and a recipe that trains on it in seconds, shared by several test folders."""

import os
from pathlib import Path

from PIL import Image

from contrastive.config import Config, load_config
from contrastive.shards import open_source, write_shards

COLOURS = ["red", "green", "blue", "yellow", "black", "orange", "purple", "brown"]
RECIPE = """
run: {{dir: {dir}/run}}
model:
  image: {{name: vit_tiny_patch16_224, size: 16,
          kwargs: {{patch_size: 8, embed_dim: 32, depth: 1, num_heads: 2, proj_drop_rate: 0.1}}}}
  text: {{width: 32, depth: 1, heads: 2, dropout: 0.1}}
  tokenizer: {{vocab_size: 300, context: 8}}
  dim: 16
data: {{train: {dir}/shards, validation: {dir}/shards, workers: 0, augment: {{crop: [0.5, 1.0], color: 0.2}}}}
train: {{steps: 8, global_batch: 16, precision: fp32}}
checkpoint: {{every: 100}}
eval: {{report: false}}
track: {{with: [], log_every: 1}}
"""


def write_corpus(folder: Path) -> Path:
    """Forty images with sidecar captions in ``folder/images``, and the same as shards in ``folder/shards``."""
    images = folder / "images"
    images.mkdir(parents=True)
    for number in range(40):
        colour = COLOURS[number % 8]
        image = Image.new("RGB", (20, 20), "white")
        image.paste(colour, (2 + number // 8, 2, 12 + number // 8, 12))
        image.save(images / f"{number:03d}.png")
        (images / f"{number:03d}.txt").write_text(f"{colour} square {number // 8}")
    write_shards(open_source(images), folder / "shards")
    return folder


def write_recipe(corpus: Path, path: Path) -> Path:
    """The tiny recipe over `corpus`, as a file."""
    path.write_text(RECIPE.format(dir=corpus))
    return path


def tiny_config(corpus: Path, run_dir: Path, *overrides: str) -> Config:
    """The tiny recipe, with its run folder and changes."""
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    # several ranks of one run write it at once
    recipe = write_recipe(corpus, run_dir.parent / f"tiny-{os.getpid()}.yaml")
    return load_config(recipe, [f"run.dir={run_dir}", *overrides])

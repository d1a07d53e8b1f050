"""A set in which images occur twice, with other captions: the loss is told so, in every way of running."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from contrastive.losses import InfoNCE
from contrastive.pretrain import pretrain
from contrastive.shards import open_source, write_shards
from tests.distributed.spawn import run_ranks
from tests.tiny import COLOURS, tiny_config

EXACT = ["model.image.kwargs.proj_drop_rate=0.0", "model.text.dropout=0.0", "data.validation=null"]
SEEN: list[torch.Tensor] = []


class Recording(InfoNCE):
    """InfoNCE that keeps the ids that it was given."""

    def forward(self, *arguments, ids=None, **keywords):
        SEEN.append(ids.clone())
        return super().forward(*arguments, ids=ids, **keywords)


@pytest.fixture(scope="module")
def repeated(tmp_path_factory) -> Path:
    """Twenty images, each in two files with a caption of its own."""
    folder = tmp_path_factory.mktemp("repeated")
    (folder / "images").mkdir()
    for number in range(40):
        image = Image.new("RGB", (20, 20), COLOURS[number % 20 % 8])
        image.paste("white", (2, 2, 3 + number % 20 // 8 * 4, 9))
        image.save(folder / "images" / f"{number:03d}.png")
        (folder / "images" / f"{number:03d}.txt").write_text(f"{COLOURS[number % 8]} caption {number}")
    write_shards(open_source(folder / "images"), folder / "shards")
    return folder


def losses(rank: int, world: int, corpus: Path, run_dir: Path, overrides: list[str]) -> list[float]:
    config = tiny_config(corpus, run_dir / "run", *EXACT, *overrides)
    pretrain(config, quiet=True)
    rows = map(json.loads, (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines())
    return [row["train/loss"] for row in rows if "train/loss" in row]


def test_a_step_gives_the_loss_the_ids_of_captions_and_images(repeated, tmp_path):
    SEEN.clear()
    loss = "{kind: custom, path: 'tests.training.test_equal_images:Recording', args: {same_caption: ignore}}"
    losses(0, 1, repeated, tmp_path, [f"loss={loss}", "train.global_batch=40", "train.steps=2"])
    for ids in SEEN:
        assert ids.shape == (40, 2)
        assert (len(ids[:, 0].unique()), len(ids[:, 1].unique())) == (40, 20)


@pytest.mark.parametrize("same", ["ignore", "positive"])
def test_chunks_and_two_processes_have_the_losses_of_one(repeated, tmp_path, same):
    options = [f"loss={{kind: infonce, same_caption: {same}}}"]
    plain = losses(0, 1, repeated, tmp_path / "plain", options)
    negative = losses(0, 1, repeated, tmp_path / "negative", ["loss={kind: infonce, same_caption: negative}"])
    chunked = losses(0, 1, repeated, tmp_path / "chunked", [*options, "train.chunk=5"])
    two = run_ranks(2, losses, repeated, tmp_path / "two", options)[0]
    assert plain[0] != pytest.approx(negative[0], rel=1e-4)  # a batch of 16 of 40 has some images twice
    assert chunked == pytest.approx(plain, rel=1e-4)
    assert two == pytest.approx(plain, rel=1e-4)

"""Two processes fine-tune as one: a tower that is held and let go, layer decay, adapters."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from contrastive.pretrain import pretrain
from tests.distributed.spawn import run_ranks
from tests.tiny import tiny_config, write_corpus

EXACT = ["model.image.kwargs.proj_drop_rate=0.0", "model.text.dropout=0.0", "train.steps=12"]
LATE = ["model.image.unfreeze_at=6", "model.text.unfreeze_at=50%", "model.image.layer_decay=0.5", "optim.clip=0.1"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def train(rank: int, world: int, corpus: Path, run_dir: Path, overrides: list[str]) -> list[tuple[float, float]]:
    config = tiny_config(corpus, run_dir / "run", *EXACT, *overrides)
    pretrain(config, quiet=True)
    rows = [json.loads(line) for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()]
    return [(row["train/loss"], row["train/gradient_norm"]) for row in rows if "train/loss" in row]


def test_a_tower_that_is_held_on_two_processes_is_held_as_on_one(corpus, tmp_path):
    """One process spares the backward of the trunk, DDP averages its gradients and drops them."""
    every = [*LATE, "checkpoint={every: 1, keep: 20}"]
    # launched alone a process has DDP too; the plain run here has not
    plain = train(0, 1, corpus, tmp_path / "plain", every)
    for world in (1, 2):
        place = tmp_path / str(world)
        found = run_ranks(world, train, corpus, place, every)[0]
        for column in (0, 1):
            assert [row[column] for row in found] == pytest.approx([row[column] for row in plain], rel=1e-4)
        states = [load_file(place / f"run/checkpoints/step_{n}/model.safetensors") for n in (1, 6, 7)]
        trunks = [name for name in states[0] if name.startswith(("image.", "text.")) and "projection" not in name]
        assert all(torch.equal(states[0][name], states[1][name]) for name in trunks)
        assert not any(torch.equal(states[1][name], states[2][name]) for name in trunks if "blocks.0.mlp" in name)


def test_adapters_learn_on_two_processes_as_on_one(corpus, tmp_path):
    pytest.importorskip("peft")
    lora = ["model.image.lora={rank: 2}", "model.text.lora={rank: 2}", "optim.lr=1e-2"]
    one = train(0, 1, corpus, tmp_path / "one", lora)
    two = run_ranks(2, train, corpus, tmp_path / "two", lora)[0]
    for column in (0, 1):
        assert [row[column] for row in two] == pytest.approx([row[column] for row in one], rel=1e-4)
    assert one[-1][0] < one[0][0]

"""Two processes train as one: the loss at every step, the gradients of both towers and of the scale."""

import json
from pathlib import Path

import pytest
import torch

from contrastive.build import build_accelerator, build_data, build_model, build_trainer
from contrastive.pretrain import pretrain
from tests.distributed.spawn import run_ranks
from tests.tiny import tiny_config, write_corpus

# Dropout draws from each process's own stream, so the comparison is made without it.
EXACT = ["model.image.kwargs.proj_drop_rate=0.0", "model.text.dropout=0.0"]
LOSSES = [["loss.kind=infonce"], ["loss.kind=margin", "loss.negatives=hardest"]]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def train(rank: int, world: int, corpus: Path, run_dir: Path, overrides: list[str], pair: bool = True) -> list[float]:
    config = tiny_config(corpus, run_dir / "run", *(EXACT if pair else []), *overrides)
    pretrain(config, quiet=True)
    rows = [json.loads(line) for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def gradients(rank: int, world: int, corpus: Path, run_dir: Path, overrides: list[str]) -> dict[str, torch.Tensor]:
    config = tiny_config(corpus, run_dir / f"rank-{rank}" / "run", *EXACT, *overrides)
    data = build_data(config)
    accelerator = build_accelerator(config)
    path = corpus / "tokenizer.json"
    if rank == 0 and not path.exists():
        from contrastive.models import train_tokenizer

        train_tokenizer(data.captions(), vocab_size=300).save(str(path))
    accelerator.wait_for_everyone()
    trained = [f"model.tokenizer.path={path}", "model.tokenizer.vocab_size=8000"]
    config = tiny_config(corpus, run_dir / f"rank-{rank}" / "run", *EXACT, *overrides, *trained)
    trainer = build_trainer(config, accelerator, build_model(config), data, quiet=True)
    batch = next(iter(trainer.make_loader(0)))
    out = trainer.model(batch.pixels, batch.tokens)
    loss = trainer.train_step.loss(out["image"], out["text"], out["scale"], out["bias"], ids=batch.ids)
    accelerator.backward(loss["loss"])
    model = accelerator.unwrap_model(trainer.model)
    return {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("overrides", LOSSES, ids=lambda o: o[0])
def test_two_processes_give_the_loss_curve_of_one(corpus, tmp_path, overrides):
    overrides = [*overrides, "train.steps=50"]
    one = run_ranks(1, train, corpus, tmp_path / "one", overrides)[0]
    two = run_ranks(2, train, corpus, tmp_path / "two", overrides)[0]
    assert len(one) == len(two) == 50
    assert one[-1] < 0.8 * one[0]  # a curve that does not move would agree with anything
    assert two == pytest.approx(one, rel=1e-4)


def test_an_open_clip_model_trains_on_two_processes_as_on_one(corpus, tmp_path):
    name = tmp_path / "tiny-clip.json"
    vision = {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    name.write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    overrides = ["model.kind=open_clip", f"model.name={name}", "train.steps=5"]
    one = run_ranks(1, train, corpus, tmp_path / "one", overrides, False)[0]
    two = run_ranks(2, train, corpus, tmp_path / "two", overrides, False)[0]
    assert len(two) == 5 and two == pytest.approx(one, rel=1e-4)


@pytest.mark.parametrize("overrides", LOSSES, ids=lambda o: o[0])
@pytest.mark.parametrize("world", [2, 4])
def test_gradients_of_every_parameter_are_those_of_one_process(corpus, tmp_path, overrides, world):
    one = run_ranks(1, gradients, corpus, tmp_path / "one", overrides)[0]
    for several in run_ranks(world, gradients, corpus, tmp_path / "several", overrides):
        assert several.keys() == one.keys()
        for key, expected in one.items():
            error = (several[key] - expected).norm() / expected.norm().clamp(min=1e-8)
            assert error <= 1e-5, (key, float(error))

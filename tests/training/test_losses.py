"""Every loss that a recipe can name trains, is the loss that it names, and resumes with what it keeps."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from contrastive.build import build_loss
from contrastive.errors import UserError
from contrastive.losses import CustomLoss, InfoNCE, Margin, WeightedSum
from contrastive.pretrain import dry_run, pretrain
from tests.tiny import tiny_config

SIGMOID = ["model.logit_bias=-10", "model.logit_scale.init=10"]
LOSSES = {
    "infonce": ["loss={kind: infonce, same_caption: positive, label_smoothing: 0.1}"],
    "dcl": ["loss.kind=dcl"],
    "siglip": ["loss.kind=siglip", *SIGMOID],
    "margin": ["loss={kind: margin, negatives: semi-hard, adaptive: 0.5}"],
    "warm-up": ["loss={kind: margin, negatives: hardest, warmup_steps: 6}"],
    "sogclr": ["loss={kind: sogclr, gamma: 0.5}"],
    "fastclip": ["loss={kind: sogclr, gamma: 0.5, rho: 6.5}"],
    "list": ["loss=[{kind: infonce}, {kind: cyclip, weight: 0.5}, {kind: siglip}]", *SIGMOID],
    "custom": ["loss={kind: custom, path: 'tests.training.test_losses:Counting', args: {strength: 3.0}}"],
}
KEEPS = ["warm-up", "sogclr", "custom"]


class Counting(torch.nn.Module):
    """A user's loss with a state: InfoNCE whose weight falls with the number of calls."""

    def __init__(self, strength: float) -> None:
        super().__init__()
        self.strength = strength
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, *arguments, **keywords):
        self.calls += 1
        result = InfoNCE()(*arguments, **keywords)
        return {"loss": self.strength * result["loss"] / self.calls}


def rows(config) -> list[dict[str, float]]:
    lines = (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "train/loss" in row]


def weights(config) -> dict[str, torch.Tensor]:
    return load_file(Path(config.run.dir) / "model" / "model.safetensors")


@pytest.mark.parametrize("overrides", LOSSES.values(), ids=LOSSES)
def test_every_loss_trains(make_config, overrides):
    config = make_config(*overrides, "train.steps=80", "optim.lr=3e-3")
    pretrain(config, quiet=True)
    logged = rows(config)
    accuracy = next(key for key in ("train/accuracy", "train/infonce_accuracy", "train/loss") if key in logged[0])
    early, late = (sum(row[accuracy] for row in part) for part in (logged[:10], logged[-10:]))
    assert late < early if accuracy == "train/loss" else late > early


def test_distillation_trains_from_a_run_folder(make_config, tmp_path):
    teacher = make_config(f"run.dir={tmp_path}/teacher", "train.steps=60", "optim.lr=3e-3")
    pretrain(teacher, quiet=True)
    config = make_config(f"loss={{kind: distillation, teacher: {tmp_path}/teacher}}", "train.steps=40", "optim.lr=3e-3")
    pretrain(config, quiet=True)
    logged = rows(config)
    assert sum(row["train/loss"] for row in logged[-10:]) < sum(row["train/loss"] for row in logged[:10])


def test_a_list_is_the_weighted_sum_and_logs_its_terms(make_config):
    config = make_config("loss=[{kind: infonce, weight: 2}, {kind: dcl}, {kind: infonce, label_smoothing: 0.1}]")
    loss = build_loss(config, 40, {})
    assert isinstance(loss, WeightedSum)
    assert loss.weights == {"infonce0": 2.0, "dcl": 1.0, "infonce2": 1.0}
    pretrain(config, stop_after=1, quiet=True)
    row = rows(config)[0]
    total = 2 * row["train/infonce0_loss"] + row["train/dcl_loss"] + row["train/infonce2_loss"]
    assert row["train/loss"] == pytest.approx(total, rel=1e-6)


def test_options_of_a_recipe_reach_the_loss(make_config):
    config = make_config("loss={kind: margin, negatives: hardest, warmup_steps: 7, tile: 32, exchange: ring}")
    loss = build_loss(config, 40, {})
    assert isinstance(loss, Margin) and loss.warmup_steps == 7
    assert (loss.options["tile"], loss.options["exchange"]) == (32, "ring")
    custom = build_loss(make_config(*LOSSES["custom"]), 40, {})
    assert isinstance(custom, CustomLoss) and custom.loss.strength == 3.0


@pytest.mark.parametrize("name", KEEPS)
def test_a_loss_with_a_state_resumes_bit_for_bit(make_config, tmp_path, name):
    whole, parts = (make_config(*LOSSES[name], f"run.dir={tmp_path}/{part}") for part in ("whole", "parts"))
    pretrain(whole, quiet=True)
    pretrain(parts, stop_after=3, quiet=True)
    kept = load_file(Path(parts.run.dir) / "checkpoints" / "step_3" / "loss.safetensors")
    assert any(value.isfinite().any() and value.any() for value in kept.values())
    pretrain(parts, resume=True, quiet=True)
    resumed, expected = weights(parts), weights(whole)
    assert all(torch.equal(resumed[key], value) for key, value in expected.items())


def test_resuming_with_another_loss_is_refused(make_config):
    pretrain(make_config(), stop_after=2, quiet=True)
    with pytest.raises(UserError, match=r"its loss is another one \(saved \['infonce'\], now \['sogclr'\]"):
        pretrain(make_config("loss.kind=sogclr"), resume=True, quiet=True)
    config = Path(make_config().run.dir) / "config.yaml"
    assert "sogclr" not in config.read_text()  # and what stands there is still the run's own


def test_a_checkpoint_that_lacks_what_the_loss_keeps_is_refused(make_config):
    config = make_config("loss.kind=sogclr")
    pretrain(config, stop_after=2, quiet=True)
    folder = Path(config.run.dir) / "checkpoints" / "step_2"
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"]["loss.safetensors"]  # as if a loss without a state had been saved
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "loss.safetensors").unlink()
    with pytest.raises(UserError, match="does not hold what the loss keeps from step to step .log_u"):
        pretrain(config, resume=True, quiet=True)


@pytest.mark.parametrize("job", [lambda config: pretrain(config, quiet=True), dry_run], ids=["train", "dry run"])
@pytest.mark.parametrize("loss, message", [
    ("{kind: custom, path: 'no_such_package:loss'}", "loss.path: no_such_package cannot be imported"),
    ("{kind: distillation, teacher: runs/nowhere}", "loss.teacher: runs/nowhere does not exist"),
])  # fmt: skip
def test_what_a_loss_names_and_is_not_there_is_told_first(make_config, job, loss, message):
    config = make_config(f"loss={loss}")
    with pytest.raises(UserError, match=message):
        job(config)
    assert not Path(config.run.dir).exists()


def test_a_dry_run_refuses_chunks_of_a_tower_with_batch_normalisation(make_config):
    with pytest.raises(UserError, match="train.chunk: 4 does not go with image.trunk.bn1"):
        dry_run(make_config("model.image.name=resnet18", "model.image.kwargs={}", "train.chunk=4"))


def test_chunks_give_the_loss_curve_of_whole_batches_for_a_loss_with_a_state(corpus, tmp_path):
    exact = ["model.image.kwargs.proj_drop_rate=0.0", "model.text.dropout=0.0", "loss={kind: sogclr, gamma: 0.5}"]
    curves = []
    for name, chunk in (("whole", "null"), ("chunks", "5")):
        config = tiny_config(corpus, tmp_path / name / "run", *exact, f"train.chunk={chunk}", "train.steps=12")
        pretrain(config, quiet=True)
        curves.append([row["train/loss"] for row in rows(config)])
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)

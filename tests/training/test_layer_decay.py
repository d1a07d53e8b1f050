"""Layer-wise learning-rate decay: how far each layer moves, and that a run goes on with it."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from contrastive.build import build_accelerator, build_data, build_model, build_trainer
from contrastive.errors import UserError
from contrastive.models import train_tokenizer
from contrastive.pretrain import pretrain
from contrastive.training.optimizer import parameter_groups

DECAY = [
    "model.image.layer_decay=0.5", "model.image.kwargs.depth=2", "model.text.layer_decay=0.25", "model.text.lr_scale=2",
    "optim={lr: 1e-3, weight_decay: 0, eps: 1e-30, clip: null, warmup: 0, schedule: constant}",
]  # fmt: skip


def test_the_first_step_of_adam_moves_each_layer_by_its_own_rate(make_config, corpus, tmp_path):
    train_tokenizer(["red square"] * 3, vocab_size=300).save(str(tmp_path / "tokenizer.json"))
    config = make_config(*DECAY, f"model.tokenizer.path={tmp_path}/tokenizer.json", "model.tokenizer.vocab_size=8000")
    model = build_model(config)
    before = copy.deepcopy(model.state_dict())
    trainer = build_trainer(config, build_accelerator(config), model, build_data(config), quiet=True)
    Path(config.run.dir).mkdir()
    trainer.fit(stop_after=1)
    # Without decay of weights Adam's first step is the rate, whatever the gradient, where there is one.
    moved = {name: float((p.detach() - before[name]).abs().max()) for name, p in model.named_parameters()}
    expected = {
        "image.trunk.patch_embed.proj.weight": 0.5**3,
        "image.trunk.blocks.0.attn.proj.weight": 0.5**2,
        "image.trunk.blocks.1.mlp.fc2.bias": 0.5,
        "image.trunk.norm.bias": 0.5,
        "image.projection.weight": 1.0,
        "text.embedding.weight": 2 * 0.25**2,
        "text.position": 2 * 0.25**2,
        "text.blocks.0.qkv.weight": 2 * 0.25,
        "text.projection.weight": 2.0,
        "logit_scale": 1.0,
    }
    for name, factor in expected.items():
        assert moved[name] == pytest.approx(1e-3 * factor, rel=1e-3), name


def test_a_run_with_layer_decay_resumes_bit_for_bit(make_config, tmp_path):
    whole, parts = make_config(*DECAY, f"run.dir={tmp_path}/whole"), make_config(*DECAY)
    pretrain(whole, quiet=True)
    pretrain(parts, stop_after=3, quiet=True)
    pretrain(parts, resume=True, quiet=True)
    one, other = (load_file(Path(config.run.dir) / "model" / "model.safetensors") for config in (whole, parts))
    assert all(torch.equal(other[name], value) for name, value in one.items())


def test_another_decay_is_refused_as_the_moments_are_numbered_by_it(make_config):
    pretrain(make_config(), stop_after=2, quiet=True)
    with pytest.raises(UserError, match="its layer decay is another one"):
        pretrain(make_config("model.text.layer_decay=0.5"), resume=True, quiet=True)


def test_without_a_decay_the_groups_are_those_of_towers_alone(make_model_with_layers):
    model, layers = make_model_with_layers
    names = [group["name"] for group in parameter_groups(model, 1e-3, 0.1, {"image": 1.0, "text": 1.0})]
    assert names == ["image/decay", "text/decay"]
    groups = parameter_groups(model, 1e-3, 0.1, {"image": 1.0, "text": 1.0}, {"image": 0.1}, layers)
    assert [(group["name"], group["lr"]) for group in groups] == [
        ("image/layer_0/decay", pytest.approx(1e-5)),
        ("image/layer_2/decay", pytest.approx(1e-3)),
        ("text/decay", pytest.approx(1e-3)),
    ]


@pytest.fixture
def make_model_with_layers():
    model = torch.nn.ModuleDict({
        "image": torch.nn.Sequential(*(torch.nn.Linear(2, 2, bias=False) for _ in range(2))),
        "text": torch.nn.Linear(2, 2, bias=False),
    })  # fmt: skip
    return model, {"image.0.weight": 0, "image.1.weight": 2}

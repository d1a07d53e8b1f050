"""A run that starts from a saved model: its weights, tokenizer and architecture, and what a recipe may change."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from contrastive.build import build_model
from contrastive.errors import UserError
from contrastive.models import fingerprint, load, open_clip_model, save_model
from contrastive.pretrain import dry_run, pretrain


@pytest.fixture
def start(make_config, tmp_path):
    config = make_config(f"run.dir={tmp_path}/start")
    pretrain(config, stop_after=2, quiet=True)
    return Path(config.run.dir)


@pytest.fixture
def tune(make_config, start):
    def make(*overrides: str):
        return make_config("model.kind=folder", f"model.path={start}", *overrides)

    return make


def test_it_starts_with_the_weights_and_the_tokenizer_of_the_folder(tune, start):
    saved, model = load(start, device="cpu"), build_model(tune())
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in saved.state_dict().items())
    assert torch.equal(model.tokenize(["a red square", "blue"]), saved.tokenize(["a red square", "blue"]))
    assert (model.name, saved.name) == ("run", "start") and all(p.requires_grad for p in model.parameters())


def test_a_model_folder_is_as_good_as_a_run_folder(tune, start):
    one, other = build_model(tune()), build_model(tune(f"model.path={start}/model"))
    assert fingerprint(one) == fingerprint(other)


def test_it_trains_saves_and_resumes_bit_for_bit(tune, start, tmp_path):
    whole, parts = tune(f"run.dir={tmp_path}/whole"), tune(f"run.dir={tmp_path}/parts")
    pretrain(whole, quiet=True)
    pretrain(parts, stop_after=3, quiet=True)
    for name in ("config.json", "model.safetensors"):  # its weights are in the checkpoint by now
        assert (start / "model" / name).is_file()
    pretrain(parts, resume=True, quiet=True)
    one, other, first = (load_file(Path(d) / "model/model.safetensors") for d in (whole.run.dir, parts.run.dir, start))
    assert all(torch.equal(other[name], value) for name, value in one.items())
    assert not torch.equal(one["text.embedding.weight"], first["text.embedding.weight"])


def test_a_recipe_may_lock_a_tower_and_set_the_scale_and_a_bias(tune):
    model = build_model(tune(
        "model.text.locked=true", "model.logit_scale={init: 20, max: 30, learned: false}", "model.logit_bias=-10",
    ))  # fmt: skip
    learned = {name for name, p in model.named_parameters() if p.requires_grad}
    assert model.locked == ("text",) and {n for n in learned if n.startswith("text.")} == {"text.projection.weight"}
    assert float(model.logit_scale.detach().exp()) == pytest.approx(20) and model.scale_max == 30
    assert "logit_scale" not in learned and float(model.logit_bias.detach()) == -10


def test_an_open_clip_model_can_be_the_start(tune, tmp_path):
    vision = {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    model = open_clip_model(str(path))
    save_model(model, tmp_path / "clip")
    config = tune(f"model.path={tmp_path}/clip", "train.steps=2", "model.image.layer_decay=0.5")
    assert fingerprint(build_model(config)) == fingerprint(model)
    pretrain(config, quiet=True)
    assert load(config.run.dir, device="cpu").name == "tiny"


def test_a_folder_that_is_not_there_is_told_before_anything_is_written(tune):
    config = tune("model.path=runs/nowhere")
    for do in (pretrain, dry_run):
        with pytest.raises(UserError, match="model.path: runs/nowhere does not exist; name a run folder"):
            do(config)
    assert not Path(config.run.dir).exists()


def test_what_the_folder_settles_is_no_key(tune):
    with pytest.raises(UserError, match="model.dim: unknown key"):
        tune("model.dim=32")
    with pytest.raises(UserError, match="model.image.name: unknown key"):
        tune("model.image.name=resnet50")

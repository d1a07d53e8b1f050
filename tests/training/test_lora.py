"""A run with adapters: what its folder holds, and that it resumes exactly."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from contrastive.errors import UserError
from contrastive.models import describe, load
from contrastive.pretrain import pretrain
from tests.distributed.spawn import PATIENCE

pytest.importorskip("peft")

LORA = ["model.image.lora={rank: 2, dropout: 0.1}", "model.text.lora={rank: 2, targets: [qkv]}", "optim.lr=1e-2"]


def folder(config) -> Path:
    return Path(config.run.dir)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    from tests.tiny import tiny_config, write_corpus

    place = tmp_path_factory.mktemp("lora")
    config = tiny_config(write_corpus(place / "corpus"), place / "run", *LORA, "checkpoint={every: 1, keep: 9}")
    pretrain(config, quiet=True)
    return config


def test_the_saved_model_is_merged_and_is_what_the_adapters_made(run):
    merged = load_file(folder(run) / "model" / "model.safetensors")
    assert not [name for name in merged if "lora" in name or "base_layer" in name]
    saved = load_file(folder(run) / "checkpoints" / "step_8" / "model.safetensors")
    layer = "text.blocks.0.qkv"
    product = saved[f"{layer}.lora_B.default.weight"] @ saved[f"{layer}.lora_A.default.weight"]
    assert product.abs().max() > 1e-4
    torch.testing.assert_close(
        merged[f"{layer}.weight"], saved[f"{layer}.base_layer.weight"] + 16 / 2 * product, rtol=0, atol=1e-6
    )


def test_the_saved_model_opens_where_peft_is_not_installed(run):
    code = "import sys; sys.modules['peft'] = None; import contrastive; "
    code += f"model = contrastive.load({str(folder(run))!r}, device='cpu'); print(model.dim)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout.strip() == "16", done.stderr


def test_the_locked_weights_stand_still_in_the_checkpoints(run):
    first, last = (load_file(folder(run) / "checkpoints" / f"step_{n}" / "model.safetensors") for n in (1, 8))
    moved = {name for name, value in first.items() if not torch.equal(value, last[name])}
    own = {"image.projection.weight", "text.projection.weight", "logit_scale"}
    assert moved == own | {name for name in first if "lora_" in name}


@pytest.mark.parametrize("stops", [[1], [5], [2, 6]], ids=str)
def test_a_run_with_adapters_resumes_bit_for_bit(make_config, run, stops):
    config = make_config(*LORA)
    for number, stop in enumerate([*stops, None]):
        pretrain(config, resume=number > 0, stop_after=stop, quiet=True)
    whole, resumed = (load_file(folder(c) / "model" / "model.safetensors") for c in (run, config))
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


@pytest.mark.parametrize("override", ["model.text.lora.rank=3", "model.image.lora=null"])
def test_other_adapters_are_refused(make_config, override):
    pretrain(make_config(*LORA), stop_after=1, quiet=True)
    with pytest.raises(UserError, match="its (adapters|locked towers) is another one"):
        pretrain(make_config(*LORA, override), resume=True, quiet=True)


def test_adapters_may_be_held_and_have_layers(make_config):
    config = make_config(*LORA, "model.image.unfreeze_at=3", "model.image.layer_decay=0.5", "checkpoint.every=1")
    pretrain(config, stop_after=4, quiet=True)
    three, four = (load_file(folder(config) / "checkpoints" / f"step_{n}" / "model.safetensors") for n in (3, 4))
    last = [name for name in three if "lora_B" in name]
    assert {name.split(".")[0] for name in last if not torch.equal(three[name], four[name])} == {"image", "text"}
    assert not any(three[name].any() for name in last if name.startswith("image."))


def test_a_run_may_start_from_a_folder_and_adapt_it(make_config, run, tmp_path):
    config = make_config(
        "model.kind=folder", f"model.path={folder(run)}", "model.image.lora={rank: 1}", f"run.dir={tmp_path}/tuned"
    )
    pretrain(config, quiet=True)
    start, tuned = load(folder(run), device="cpu"), load(folder(config), device="cpu")
    assert {**describe(tuned), "name": "run"} == describe(start)
    changes = {name for name, value in start.state_dict().items() if not torch.equal(value, tuned.state_dict()[name])}
    assert "image.trunk.blocks.0.attn.qkv.weight" in changes and "image.trunk.norm.weight" not in changes
    assert json.loads((folder(config) / "results.json").read_text())["sets"]

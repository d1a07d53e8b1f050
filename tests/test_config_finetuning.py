"""The keys of fine-tuning: what they may be, and what does not go together."""

import pytest

from contrastive.config import FolderModelConfig, ImageTowerConfig, LoraConfig, TowerConfig, dump_yaml, load_config
from contrastive.errors import UserError

MINIMAL = "data: {train: shards}\ntrain: {steps: 10}\n"
PLACE = (
    "expected a number of steps, a share of the run such as 10%, or a text such as 1 epoch or 50000 samples, above 0 "
    "and below 100%"
)
TARGETS = "expected auto, or a list of names of modules as they end, such as [qkv, mlp.fc1]"


@pytest.fixture
def recipe(tmp_path):
    def load(*overrides: str):
        path = tmp_path / "mine.yaml"
        path.write_text(MINIMAL)
        return load_config(path, overrides)

    return load


def test_the_keys_are_read_and_written(recipe, tmp_path):
    config = recipe(
        "model={kind: folder, path: runs/a, image: {layer_decay: 0.75, unfreeze_at: 10%}, "
        "text: {lora: {rank: 4, targets: [qkv]}}}"
    )
    assert config.model == FolderModelConfig(
        path="runs/a",
        image=ImageTowerConfig(layer_decay=0.75, unfreeze_at="10%"),
        text=TowerConfig(lora=LoraConfig(rank=4, targets=("qkv",))),
    )
    (tmp_path / "resolved.yaml").write_text(dump_yaml(config))
    assert load_config(tmp_path / "resolved.yaml") == config


@pytest.mark.parametrize(("override", "line"), [
    ("model.image.layer_decay=0", "model.image.layer_decay: expected a number above 0 (value 0)"),
    ("model.image.layer_decay=1.5", "model.image.layer_decay: expected a number of at most 1 (value 1.5)"),
    ("model.text.unfreeze_at=0", f"model.text.unfreeze_at: {PLACE} (value 0)"),
    ("model.text.unfreeze_at=100%", f'model.text.unfreeze_at: {PLACE} (value "100%")'),
    ("model.text.unfreeze_at=10m", f'model.text.unfreeze_at: {PLACE} (value "10m")'),
    ("model.image.lora.rank=0", "model.image.lora.rank: expected a number of at least 1 (value 0)"),
    ("model.image.lora.rang=4", "model.image.lora.rang: unknown key (value 4). Did you mean 'rank'?"),
    ("model.image.lora.targets=[]", f"model.image.lora.targets: {TARGETS} (value [])"),
    ("model.image.lora.targets=qkv", f'model.image.lora.targets: {TARGETS} (value "qkv")'),
    ("model.kind=folder", "model.path: missing; expected a run folder or a model folder"),
])  # fmt: skip
def test_a_wrong_value_is_told_with_its_path_and_a_remedy(recipe, override, line):
    with pytest.raises(UserError) as caught:
        recipe(override)
    assert str(caught.value).partition("mine.yaml: ")[2] == line


@pytest.mark.parametrize(("override", "line"), [
    ("lora={}", "model.text.lora: the adapters lock the tower themselves; leave model.text.locked out"),
    ("unfreeze_at=5", "model.text.unfreeze_at: 5 does not come for a tower that is locked for good; "
                      "set model.text.locked to false"),
    ("layer_decay=0.5", "model.text.layer_decay: 0.5 does nothing for a locked tower; set it to 1"),
])  # fmt: skip
def test_what_says_otherwise_of_a_locked_tower_is_refused(recipe, override, line):
    with pytest.raises(UserError) as caught:
        recipe("model.text.locked=true", f"model.text.{override}")
    assert str(caught.value).partition("mine.yaml: ")[2] == line

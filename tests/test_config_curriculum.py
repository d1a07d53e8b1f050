"""The keys of a run in stages, and what they are refused with."""

import re
from pathlib import Path

import pytest

from contrastive.config import dump_yaml, load_config
from contrastive.errors import UserError

RECIPE = "data: {train: shards}\ntrain: {steps: 100}\nmodel: {image: {name: vit_tiny_patch16_224}}\n"
DROP = "model.image.patch_dropout=0.5"


@pytest.fixture
def load(tmp_path):
    def config(*overrides: str):
        path = tmp_path / "mine.yaml"
        path.write_text(RECIPE)
        return load_config(path, overrides)

    return config


def test_stages_read_back_equal(load, tmp_path):
    config = load("train.curriculum=[{until: 80%, size: 32, context: 16}, {until: 9 epochs, patch_dropout: 0.5}]")
    assert [stage.size for stage in config.train.curriculum] == [32, None]
    (tmp_path / "resolved.yaml").write_text(dump_yaml(config))
    assert load_config(tmp_path / "resolved.yaml") == config


@pytest.mark.parametrize("overrides, line", [
    (["train.curriculum=[{until: 5, sise: 32}]"],
     "train.curriculum[0].sise: unknown key (value 32). Did you mean 'size'?"),
    (["train.curriculum=[{size: 32}]"],
     "train.curriculum[0].until: missing; expected its end: a step, 80% of the run, 10 epochs, 50000 samples; 10m of a "
     "run in minutes"),
    (["train.curriculum=[{until: 5}]"],
     "train.curriculum[0]: this stage changes nothing; give it a size, a context or a patch_dropout, or leave it out"),
    (["train.curriculum=[{until: 50%, size: 32}, {until: 20%, size: 40}]"],
     "train.curriculum[1].until: 20% is not after the stage before; give the stages in their order"),
    (["train.curriculum=[{until: 100, size: 32}]"],
     "train.curriculum[0].until: step 100 is not before the end of the run, train.steps 100"),
    (["train.curriculum=[{until: 100%, size: 32}]"],
     "train.curriculum[0].until: 100% is the whole run; choose a share below 100%"),
    (["train.curriculum=[{until: 5m, size: 32}]"],
     "train.curriculum[0].until: 5m is a time, and the run's length is none; give a share of the run such as 80%"),
    (["train.minutes=3", "train.curriculum=[{until: 5m, size: 32}]"],
     "train.curriculum[0].until: 5m is not before the end of the run, train.minutes 3"),
    (["train.curriculum=[{until: 5, context: 33}]"],
     "train.curriculum[0].context: 33 is above model.tokenizer.context 32, for which the text tower is built; raise "
     "that, or lower it"),
    (["train.unmasked_tail=5%"],
     "train.unmasked_tail: 5% without patches that are left out before; set model.image.patch_dropout, or "
     "unmasked_tail to null"),
    ([DROP, "train.minutes=3", "train.unmasked_tail=50"],
     "train.unmasked_tail: where the last 50 of a run of train.minutes begin is known at its end only; give a share of "
     "the run such as 5%, or a time"),
    ([DROP, "train.unmasked_tail=100"],
     "train.unmasked_tail: step 100 is not before the end of the run, train.steps 100"),
    ([DROP, "model.image.locked=true"],
     "model.image.patch_dropout: a locked image tower runs as in use, with all patches; set it to 0 in model and "
     "stages, or model.image.locked to false"),
    ([DROP, "model.image.kwargs={patch_drop_rate: 0.1}"],
     "model.image.kwargs.patch_drop_rate: model.image.patch_dropout and the stages set it; leave it out"),
    (["model.image.locked=true", "model.text.locked=true", "data.cache=features",
      "data.augment={crop: [1, 1], ratio: 1}", "train.curriculum=[{until: 5, size: 32}]"],
     "data.cache: features are those of whole images and captions at the recipe's own size; use pixels or none, or "
     "leave train.curriculum and model.image.patch_dropout out"),
    (["model.image.patch_dropout=1"], "model.image.patch_dropout: expected a number below 1 (value 1)"),
])  # fmt: skip
def test_what_is_wrong_is_told_with_its_remedy(load, overrides, line):
    with pytest.raises(UserError) as caught:
        load(*overrides)
    assert str(caught.value).partition("mine.yaml: ")[2] == line


@pytest.mark.parametrize("overrides", [
    ["train.minutes=3", "train.curriculum=[{until: 1m, size: 32}, {until: 500, size: 40}]"],
    ["train.minutes=3", DROP, "train.unmasked_tail=10s"],
    ["train.curriculum=[{until: 10%, patch_dropout: 0.5}]", "train.unmasked_tail=1 epoch"],
])  # fmt: skip
def test_what_fits_together_is_read(load, overrides):
    assert load(*overrides)


PAGE = (Path(__file__).resolve().parent.parent / "docs" / "curriculum.md").read_text()


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL))
def test_every_example_of_the_page_is_a_recipe(block, tmp_path):
    rest = {"data": "data: {train: a}\n", "train": "train: {steps: 1}\n"}
    missing = "".join(line for key, line in rest.items() if not re.search(f"^{key}:", block, re.MULTILINE))
    (tmp_path / "example.yaml").write_text(block + missing)
    load_config(tmp_path / "example.yaml")

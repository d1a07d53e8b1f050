"""Locked towers that run once over the data train as those that run in every step."""

import json
from pathlib import Path

import pytest

from contrastive.errors import UserError
from contrastive.pretrain import pretrain

LOCKED = ["model.image.locked=true", "model.text.locked=true", "data.augment={crop: [1.0, 1.0], ratio: 1.0}"]


def losses(config) -> list[float]:
    pretrain(config, quiet=True)
    rows = map(json.loads, (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines())
    return [row["train/loss"] for row in rows if "train/loss" in row]


def test_cached_features_give_the_loss_of_running_the_towers(make_config, tmp_path):
    plain = losses(make_config(*LOCKED, f"run.dir={tmp_path}/plain", "train.steps=12"))
    cached = losses(make_config(*LOCKED, f"run.dir={tmp_path}/cached", "train.steps=12", "data.cache=features"))
    assert cached == pytest.approx(plain, rel=1e-4) and cached[-1] < cached[0]


def test_features_of_towers_that_learn_are_refused(make_config):
    with pytest.raises(UserError, match="model.text.locked"):
        make_config(*LOCKED, "model.text.locked=false", "data.cache=features")


def test_features_of_images_that_change_are_refused(make_config):
    with pytest.raises(UserError, match="stay the same"):
        make_config(*LOCKED, "data.augment.color=0.5", "data.cache=features")

"""A tower that is locked until a place in the run: what stands still before it, what moves behind it, and resuming."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from contrastive.build import build_unfreezing
from contrastive.errors import UserError
from contrastive.pretrain import pretrain
from contrastive.training import Duration, Point

RESNET = "model.image={name: resnet18, size: 32, kwargs: {channels: [8, 8, 16, 16], layers: [1, 1, 1, 1]}}"
LATE = [RESNET, "model.image.unfreeze_at=5", "model.text.unfreeze_at=25%"]  # steps 5 and 2 of 8


def checkpoint(config, step: int, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(Path(config.run.dir) / "checkpoints" / f"step_{step}" / f"{name}.safetensors")


def rows(config, key: str) -> list[float]:
    lines = map(json.loads, (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines())
    return [row[key] for row in lines if key in row]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A whole run with a checkpoint of every step and validations between, and its start."""
    from tests.tiny import tiny_config, write_corpus

    folder = tmp_path_factory.mktemp("late")
    corpus = write_corpus(folder / "corpus")
    config = tiny_config(corpus, folder / "run", *LATE, "checkpoint={every: 1, keep: 9}", "eval.every=1")
    pretrain(config, quiet=True)
    return config


def trunk(state: dict[str, torch.Tensor], tower: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if name.startswith(f"{tower}.") and "projection" not in name}


@pytest.mark.parametrize(("tower", "until"), [("image", 5), ("text", 2)])
def test_weights_and_statistics_stand_still_until_the_place_and_move_behind_it(run, tower, until):
    states = {step: trunk(checkpoint(run, step), tower) for step in range(1, 9)}
    for step in range(2, until + 1):
        assert all(torch.equal(value, states[step][name]) for name, value in states[1].items()), step
    probes = {
        "image": ["trunk.conv1.weight", "trunk.bn1.running_mean"],
        "text": ["blocks.0.out.weight", "embedding.weight"],
    }
    for name in (name for name in states[1] if name.endswith(tuple(probes[tower]))):
        assert not torch.equal(states[until + 1][name], states[until][name]), name
    # at the end all of it: timm starts with scales of 0, which pass no gradient to what is in front of them
    assert not [name for name, value in states[8].items() if torch.equal(value, states[until][name])]


def test_projections_move_from_the_first_step(run):
    first, second = checkpoint(run, 1), checkpoint(run, 2)
    for tower in ("image", "text"):
        assert not torch.equal(first[f"{tower}.projection.weight"], second[f"{tower}.projection.weight"])


def test_moments_begin_when_the_tower_is_let_go(run):
    """Of the last checkpoint, the steps that AdamW has counted for each tensor: 8, 8 - 5 and 8 - 2."""
    counts = [int(value) for key, value in checkpoint(run, 8, "optimizer").items() if key.endswith(".step")]
    model = checkpoint(run, 8)
    expected = {8: 3, 3: 0, 6: 0}  # both projections and the scale
    names = [name for name in model if "running" not in name and "tracked" not in name]
    expected[3] = len(trunk(dict.fromkeys(names), "image"))
    expected[6] = len(trunk(dict.fromkeys(names), "text"))
    assert {count: counts.count(count) for count in set(counts)} == expected
    assert len([key for key in checkpoint(run, 1, "optimizer") if key.endswith(".step")]) == 3


def test_until_then_the_run_is_that_of_locked_towers(make_config, run):
    """The norm that clips is the same one: gradients of a held tower do not count."""
    locked = make_config(RESNET, "model.image.locked=true", "model.text.locked=true", "train.steps=8")
    pretrain(locked, stop_after=3, quiet=True)
    for key in ("train/gradient_norm", "train/loss"):
        # a tower that may learn later is run with a graph, a locked one without: rounding
        assert rows(run, key)[:2] == pytest.approx(rows(locked, key)[:2], rel=1e-5)
    assert rows(run, "train/gradient_norm")[2] != pytest.approx(rows(locked, "train/gradient_norm")[2], rel=1e-4)


@pytest.mark.parametrize("stop", [1, 2, 4, 5, 6])
def test_a_run_that_is_resumed_across_the_place_is_the_run_that_was_not_stopped(make_config, run, stop):
    config = make_config(*LATE)
    pretrain(config, stop_after=stop, quiet=True)
    pretrain(config, resume=True, quiet=True)
    whole, resumed = (load_file(Path(c.run.dir) / "model" / "model.safetensors") for c in (run, config))
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_chunks_of_a_batch_are_as_exact_with_a_held_tower(make_config, tmp_path):
    late = ["model.image.unfreeze_at=2", "model.text.dropout=0", "model.image.kwargs.proj_drop_rate=0", "train.steps=4"]
    plain = make_config(*late, f"run.dir={tmp_path}/plain")
    chunked = make_config(*late, "train.chunk=4", f"run.dir={tmp_path}/chunked")
    for config in (plain, chunked):
        pretrain(config, quiet=True)
    assert rows(chunked, "train/loss") == pytest.approx(rows(plain, "train/loss"), rel=1e-5)
    assert rows(chunked, "train/gradient_norm") == pytest.approx(rows(plain, "train/gradient_norm"), rel=1e-4)


def test_a_tower_that_will_see_batch_statistics_is_refused_in_chunks_at_once(make_config):
    with pytest.raises(UserError, match="train.chunk: 4 does not go with image"):
        pretrain(make_config(*LATE, "train.chunk=4"), quiet=True)


@pytest.mark.parametrize(("value", "until"), [
    ("7", Point(steps=7)), ("10%", Point(share=0.1)), ("2 epochs", Point(steps=5)), ("64 samples", Point(steps=4)),
])  # fmt: skip
def test_the_place_may_be_steps_a_share_epochs_or_samples(make_config, value, until):
    config = make_config(f"model.image.unfreeze_at={value}")
    assert build_unfreezing(config, 40, Duration(steps=8)) == {"image": until}


def test_a_place_behind_the_end_is_refused(make_config):
    with pytest.raises(UserError, match="model.text.unfreeze_at: 4 epochs is step 10 of a run of 8; set it lower"):
        pretrain(make_config("model.text.unfreeze_at=4 epochs"), quiet=True)


def test_a_share_is_reached_at_its_step_and_not_one_later():
    assert [Point(share=0.3).reached(step, step * 0.1) for step in (2, 3)] == [False, True]
    assert [Point(steps=3).reached(step, 0.0) for step in (2, 3)] == [False, True]

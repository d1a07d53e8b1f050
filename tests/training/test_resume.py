"""Stopping and resuming gives the weights of the run that was not stopped, bit for bit, on one process."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from contrastive.errors import UserError
from contrastive.pretrain import pretrain


def weights(config) -> dict[str, torch.Tensor]:
    return load_file(Path(config.run.dir) / "model" / "model.safetensors")


def train_in_parts(config, stops: list[int]) -> dict[str, torch.Tensor]:
    for number, stop in enumerate([*stops, None]):
        pretrain(config, resume=number > 0, stop_after=stop, quiet=True)
    return weights(config)


@pytest.fixture
def uninterrupted(make_config, tmp_path):
    config = make_config(f"run.dir={tmp_path}/whole")
    pretrain(config, quiet=True)
    return weights(config)


@pytest.mark.parametrize("stops", [[1], [4], [7], [2, 3, 6]], ids=str)
@pytest.mark.parametrize("options", [[], ["data.workers=1", "eval.every=3"]], ids=["plain", "workers and validation"])
def test_resumed_weights_are_bit_for_bit_those_of_one_run(make_config, uninterrupted, stops, options):
    resumed = train_in_parts(make_config(*options), stops)
    assert resumed.keys() == uninterrupted.keys()
    for key, value in uninterrupted.items():
        assert torch.equal(resumed[key], value), key


def test_the_run_that_is_compared_has_learned_something(make_config, uninterrupted, tmp_path):
    pretrain(make_config(f"run.dir={tmp_path}/one"), stop_after=1, quiet=True)
    one = load_file(tmp_path / "one" / "model" / "model.safetensors")
    assert not torch.equal(one["text.embedding.weight"], uninterrupted["text.embedding.weight"])


@pytest.mark.parametrize(("override", "words"), [
    ("model.text.width=64", "its model is another one .*width: saved 32, now 64"),
    ("train.global_batch=8", "its global_batch is another one .saved 16, now 8"),
    ("run.seed=1", "its seed is another one"),
    ("data.window=4", "its window is another one .saved 32, now 4"),
    ("data.augment.color=0.4", "its transform is another one .augment.color: saved 0.2, now 0.4"),
    ("data.caption_variants=0.5", "its transform is another one .caption_variants: saved 0.0, now 0.5"),
])  # fmt: skip
def test_a_checkpoint_of_another_run_is_refused(make_config, override, words):
    pretrain(make_config(), stop_after=2, quiet=True)
    with pytest.raises(UserError, match=words):
        pretrain(make_config(override), resume=True, quiet=True)


def test_a_run_folder_is_not_overwritten_by_accident(make_config):
    config = make_config()
    pretrain(config, stop_after=1, quiet=True)
    with pytest.raises(UserError, match="--resume to go on, --overwrite"):
        pretrain(config, quiet=True)
    pretrain(config, overwrite=True, stop_after=2, quiet=True)
    assert [p.name for p in (Path(config.run.dir) / "checkpoints").iterdir()] == ["step_2"]


def test_a_refused_resume_leaves_the_run_as_it_was(make_config):
    config = make_config()
    pretrain(config, stop_after=2, quiet=True)
    before = {p.name: p.read_bytes() for p in Path(config.run.dir).iterdir() if p.is_file()}
    with pytest.raises(UserError):
        pretrain(make_config("model.text.width=64"), resume=True, quiet=True)
    assert {p.name: p.read_bytes() for p in Path(config.run.dir).iterdir() if p.is_file()} == before


@pytest.mark.parametrize("mistake", ["data.train=nowhere", "model.image.name=nothing", "train.global_batch=41"])
def test_a_mistake_deletes_nothing_of_the_run_that_was_to_be_overwritten(make_config, mistake):
    config = make_config()
    pretrain(config, stop_after=2, quiet=True)
    before = sorted(str(p) for p in Path(config.run.dir).rglob("*"))
    with pytest.raises(UserError):
        pretrain(make_config(mistake), overwrite=True, quiet=True)
    assert sorted(str(p) for p in Path(config.run.dir).rglob("*")) == before


def test_a_changed_learning_rate_holds_after_resuming(make_config):
    pretrain(make_config(), stop_after=4, quiet=True)
    config = make_config("optim.lr=1e-30", "optim.weight_decay=0.0")
    pretrain(config, resume=True, stop_after=7, quiet=True)
    folder = Path(config.run.dir) / "checkpoints"
    before, after = (load_file(folder / f"step_{n}" / "model.safetensors") for n in (4, 7))
    assert torch.equal(before["text.embedding.weight"], after["text.embedding.weight"])


def test_weights_that_are_not_finite_are_not_saved(make_config):
    config = make_config("optim.lr=1e39", "optim.clip=null", "optim.warmup=0")
    with pytest.raises(UserError, match="not finite after step 1; nothing was saved"):
        pretrain(config, stop_after=1, quiet=True)
    assert not list((Path(config.run.dir) / "checkpoints").glob("step_*"))


def test_nothing_to_resume_from_is_said(make_config):
    with pytest.raises(UserError, match="no checkpoint to go on from"):
        pretrain(make_config(), resume=True, quiet=True)


def test_only_whole_checkpoints_count_and_old_ones_go(make_config):
    config = make_config("checkpoint.every=2", "checkpoint.keep=2")
    pretrain(config, stop_after=6, quiet=True)
    folder = Path(config.run.dir) / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["step_4", "step_6"]
    (folder / ".partial_step_7").mkdir()
    (folder / "step_9").mkdir()  # no state.json: it never became whole
    pretrain(config, resume=True, stop_after=7, quiet=True)
    assert (folder / "step_7" / "state.json").is_file()

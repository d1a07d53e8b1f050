"""How often checkpoints are written, which of them stay, and how a run that a scheduler starts again goes on."""

import json
import math
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from contrastive.build import build_every
from contrastive.cli import main
from contrastive.errors import UserError
from contrastive.pretrain import pretrain
from contrastive.training import Every
from contrastive.training.checkpoint import Snapshot
from contrastive.training.saver import Saver
from tests.tiny import write_recipe


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, None),
        (500, Every(steps=500)),
        ("5%", Every(share=0.05)),
        ("30s", Every(seconds=30)),
        ("1.5 h", Every(seconds=5400)),
        ("10m", Every(seconds=600)),
        ("2 epochs", Every(steps=20)),
        ("0.5 epoch", Every(steps=5)),
        ("50000 samples", Every(steps=500)),
        ("1 sample", Every(steps=1)),
    ],
)
def test_a_period_is_steps_a_time_or_a_share(text, expected):
    assert build_every(text, epoch=1000, batch=100) == expected


@pytest.mark.parametrize(
    ("every", "steps"),
    [(Every(steps=3), [3, 6, 9]), (Every(seconds=5), [3, 5, 8, 10]), (Every(share=0.25), [3, 5, 8, 10])],
)
def test_something_is_due_whenever_a_multiple_has_been_passed(every, steps):
    places = [(step, 2.0 * step, step / 10) for step in range(11)]
    assert [now[0] for before, now in zip(places, places[1:], strict=False) if every.due(before, now)] == steps


def saved(config) -> list[str]:
    return sorted(path.name for path in (Path(config.run.dir) / "checkpoints").glob("step_*"))


def test_the_newest_those_of_every_so_many_steps_and_the_best_stay(make_config, monkeypatch):
    values = iter([0.1, 0.7, 0.3])
    monkeypatch.setattr("contrastive.pretrain.validation", lambda *_: lambda model: {"share": next(values)})
    monkeypatch.setattr("contrastive.preflight.SCALARS", ("share",))
    config = make_config(
        "checkpoint.every=1",
        "checkpoint.keep=1",
        "checkpoint.keep_every=3",
        "checkpoint.keep_best=share",
        "eval.every=2",
    )
    pretrain(config, quiet=True)
    # step 4 was the best of 2, 4 and 6; 3 and 6 are multiples; 8 is the last
    assert saved(config) == ["step_3", "step_4", "step_6", "step_8"]
    assert json.loads((Path(config.run.dir) / "checkpoints" / "best.json").read_text()) == {"step": 4, "value": 0.7}


def test_a_best_step_whose_checkpoint_was_lost_is_the_best_again_when_it_is_done_again(tmp_path):
    before, after = (Saver(tmp_path, keep=1) for _ in range(2))
    assert before.score(6, 0.7)  # killed here, before its checkpoint was whole
    assert after.score(4, 0.2) and after.score(6, 0.7)
    assert not after.score(8, 0.5)


def test_a_number_that_validation_does_not_give_is_told_with_those_it_gives(make_config):
    config = make_config("checkpoint.keep_best=top1", "eval.every=2")
    with pytest.raises(UserError, match=r"checkpoint.keep_best: 'top1'; validation gives .*zeroshot/top1"):
        pretrain(config, quiet=True)
    assert not Path(config.run.dir).exists()  # before the first step, not behind the first validation


def test_keep_best_without_validation_during_the_run_is_refused(make_config):
    with pytest.raises(
        UserError, match="checkpoint.keep_best: top1 is told by validations during the run; set eval.every"
    ):
        make_config("checkpoint.keep_best=top1")


@pytest.mark.parametrize("again", ["--auto-resume", "torchrun", "SLURM"])
def test_the_same_command_starts_and_goes_on(corpus, tmp_path, monkeypatch, again):
    recipe = write_recipe(corpus, tmp_path / "tiny.yaml")
    command = ["train", str(recipe), f"run.dir={tmp_path}/run", "data.validation=null"]
    if again == "--auto-resume":
        command.append(again)
    else:
        name = {"torchrun": "TORCHELASTIC_RESTART_COUNT", "SLURM": "SLURM_RESTART_COUNT"}[again]
        monkeypatch.setenv(name, "1")
    assert main([*command, "train.steps=4"]) == 0  # nothing there yet
    assert main([*command, "train.steps=8"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_overwrite_does_not_undo_what_a_restart_is_to_go_on_from(corpus, tmp_path, monkeypatch):
    recipe = write_recipe(corpus, tmp_path / "tiny.yaml")
    command = ["train", str(recipe), f"run.dir={tmp_path}/run", "data.validation=null", "--overwrite"]
    assert main([*command, "train.steps=4"]) == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert main([*command, "train.steps=8"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len([row for row in rows if "train/loss" in row]) == 8


@pytest.mark.parametrize(("value", "parameters", "found"), [
    ([1.0, math.nan], {"x"}, "x"),
    ([1.0, math.inf], {"x"}, "x"),
    ([-math.inf, 1.0], {"x"}, "x"),
    ([1.0, math.nan], set(), "x"),  # a batch statistic
    ([0.0, -math.inf], set(), None),  # a mask
    ([], {"x"}, None),
])  # fmt: skip
def test_a_snapshot_names_what_must_not_be_saved(value, parameters, found):
    tensors = {"model": {"fine": torch.ones(3), "count": torch.tensor(7), "x": torch.tensor(value)}}
    assert Snapshot({"step": 1}, tensors, frozenset(parameters)).not_finite() == found


def test_weights_that_are_not_finite_stop_the_run_ahead_of_its_validation(make_config):
    options = ["optim.lr=1e39", "optim.clip=null", "optim.warmup=0"]
    config = make_config(*options, "checkpoint.every=1", "eval.every=1", "checkpoint.keep_best=zeroshot/top1")
    with pytest.raises(UserError, match="not finite after step 1; nothing was saved"):
        pretrain(config, quiet=True)
    assert not list((Path(config.run.dir) / "checkpoints").glob("*"))


def tensors_saved(config) -> dict[str, torch.Tensor]:
    files = sorted((Path(config.run.dir) / "checkpoints").glob("step_*/*.safetensors"))
    return {f"{file.parent.name}/{file.stem}/{key}": value for file in files for key, value in load_file(file).items()}


BATCH_NORM = "model.image={kind: timm, name: resnet18, size: 32, kwargs: {layers: [1, 1, 1, 1]}}"


@pytest.mark.parametrize(
    "options",
    [
        ["optim.ema.decay=0.9"],
        [BATCH_NORM],  # statistics that the next forward pass changes, and a loss that keeps something
        ["loss={kind: sogclr}"],
    ],
)
def test_a_slow_copy_holds_the_next_update_back(make_config, tmp_path, monkeypatch, options):
    plain, slow = (
        make_config(f"run.dir={tmp_path}/{name}", "checkpoint.every=1", "checkpoint.keep=9", *options)
        for name in ("plain", "slow")
    )
    pretrain(plain, quiet=True)
    copy_rest, counts = Snapshot.copy_rest, []

    def late(snapshot):
        counts.append(len(snapshot.rest))
        time.sleep(0.1)
        copy_rest(snapshot)

    monkeypatch.setattr(Snapshot, "copy_rest", late)
    pretrain(slow, quiet=True)
    expected, found = tensors_saved(plain), tensors_saved(slow)
    assert counts[0] == 0 and min(counts[1:]) > 20  # of the first, with no memory to copy to, nothing is left for later
    assert len({key.split("/")[0] for key in found}) == 8 and found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_the_wait_for_a_copy_is_saving_and_no_training(make_config, monkeypatch):
    copy_rest = Snapshot.copy_rest
    monkeypatch.setattr(Snapshot, "copy_rest", lambda snapshot: (time.sleep(0.5), copy_rest(snapshot)))
    config = make_config("checkpoint.every=1", "train.steps=5")
    pretrain(config, quiet=True)
    rows = [json.loads(line) for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "train/seconds" in row]
    assert sum(row["train/time_saving"] > 0.3 for row in rows) >= 3  # in shares of a step: that is where the time is
    assert rows[-1]["train/seconds"] - rows[0]["train/seconds"] < 3 * 0.5  # the first copy is made at once


def test_a_copy_that_fails_lets_the_run_go_on_to_tell_it(make_config, monkeypatch):
    def no_memory(value):
        raise MemoryError("no memory")

    monkeypatch.setattr("contrastive.training.checkpoint._as_array", no_memory)
    # the first save has nothing to copy later
    with pytest.raises(UserError, match="the checkpoint of step 4 could not be written .no memory"):
        pretrain(make_config("checkpoint.every=2"), quiet=True)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex128]
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_what_is_copied_later_has_the_bits_of_any_type_and_layout(dtype, layout):
    value = torch.randn(4, 3, 5, 2).to(dtype).contiguous(memory_format=layout)
    copy, one = torch.zeros(4, 3, 5, 2, dtype=dtype), torch.zeros((), dtype=dtype)
    Snapshot(rest=[(copy, value), (one, value[0, 0, 0, 0])]).copy_rest()
    assert torch.equal(copy, value) and torch.equal(one, value[0, 0, 0, 0])

"""A resumed run says where its learning rate changes."""

import json
from pathlib import Path

import pytest

from contrastive.pretrain import pretrain
from contrastive.training.rates import Rates
from tests.tiny import tiny_config, write_corpus

BASE = {"data.validation": "null", "train.steps": "8"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def resumed(corpus, tmp_path, capsys):
    """The line that a run prints which is stopped after four steps and goes on with other settings."""

    def line(first: dict[str, str], then: dict[str, str]) -> list[str]:
        def config(changes: dict[str, str]):
            return tiny_config(corpus, tmp_path / "run", *(f"{k}={v}" for k, v in {**BASE, **changes}.items()))

        pretrain(config(first), stop_after=4, quiet=True)
        capsys.readouterr()
        pretrain(config(then), resume=True, stop_after=5, quiet=True)
        return [line for line in capsys.readouterr().out.splitlines() if "learning rate" in line]

    return line


@pytest.mark.parametrize(("first", "then", "expected"), [
    ({"optim.warmup": "0"}, {"optim.warmup": "0", "train.steps": "16"},
     "note: the learning rate at step 5 changes from 0.0005 to 0.000854 (train.steps 8 → 16)"),
    ({"optim.lr": "1e-3", "optim.schedule": "constant"}, {"optim.lr": "2e-3", "optim.schedule": "constant"},
     "note: the learning rate at step 5 changes from 0.001 to 0.002 (optim.lr 0.001 → 0.002)"),
    ({"optim.warmup": "0"}, {"optim.schedule": "constant", "optim.warmup": "0"},
     "note: the learning rate at step 5 changes from 0.0005 to 0.001 (optim.schedule cosine → constant)"),
    ({"optim.schedule": "constant"}, {"optim.schedule": "constant", "model.text.lr_scale": "0.5"},
     "note: the learning rate at step 5 of the text tower changes from 0.001 to 0.0005 "
     "(model.text.lr_scale 1.0 → 0.5)"),
])  # fmt: skip
def test_another_length_rate_or_schedule_is_said(resumed, first, then, expected):
    assert resumed(first, then) == [expected]


@pytest.mark.parametrize("then", [{}, {"train.global_batch": "16", "optim.weight_decay": "0"},
                                  {"train.steps": "16", "optim.schedule": "constant"}])  # fmt: skip
def test_the_same_rate_is_not_worth_a_line(resumed, then):
    first = {"optim.schedule": then.get("optim.schedule", "cosine")}
    assert resumed(first, then) == []


def test_a_checkpoint_of_an_earlier_version_has_no_rates():
    assert Rates({"image": 1.0}).change(3, None, 0.5) is None


def test_a_run_that_was_complete_goes_on_from_the_end_of_its_schedule():
    before = Rates({"image": 1e-3, "text": 1e-3}, {"train.steps": 8})
    saved = json.loads(json.dumps(before.state(0.0)))
    line = Rates({"image": 1e-3, "text": 1e-3}, {"train.steps": 16}).change(8, saved, 0.5)
    assert line == "note: the learning rate at step 9 changes from 0 to 0.0005 (train.steps 8 → 16)"


def test_rates_are_in_the_checkpoint(corpus, tmp_path: Path):
    pretrain(tiny_config(corpus, tmp_path / "run", "data.validation=null"), stop_after=1, quiet=True)
    state = json.loads((tmp_path / "run" / "checkpoints" / "step_1" / "state.json").read_text())
    assert state["rates"]["settings"]["train.steps"] == 8 and state["rates"]["peaks"]["image"] == 1e-3

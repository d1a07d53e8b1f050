"""A run ends behind the same step on every process when validation no longer improves, and says with which model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from contrastive.cli import main
from contrastive.errors import UserError
from contrastive.pretrain import pretrain
from contrastive.training import EarlyStop
from tests.distributed.spawn import run_ranks
from tests.tiny import tiny_config, write_recipe

NAN = float("nan")


def stops_at(values: list[float], **options: Any) -> int | None:
    """The number, from 1, of the validation behind which the run ends."""
    stop = EarlyStop("share", **options)
    for number, value in enumerate(values, start=1):
        stop.observe(number, value)
        if stop.stopped:
            return number
    return None


@pytest.mark.parametrize(("values", "options", "expected"), [
    ([0.1, 0.2, 0.3, 0.4], {"patience": 1}, None),
    ([0.1, 0.3, 0.2, 0.3, 0.4], {"patience": 2}, 4),                     # as good as the best is no improvement
    ([0.1, 0.3, 0.2, 0.31, 0.3, 0.3], {"patience": 2}, 6),               # an improvement starts the count anew
    ([0.1, 0.16, 0.22, 0.28], {"patience": 2, "min_delta": 0.1}, None),  # over the best that counted, not the last
    ([0.1, 0.14, 0.18, 0.22], {"patience": 2, "min_delta": 0.1}, 3),
    ([3.0, 2.0, 2.5, 2.2], {"patience": 2, "mode": "min"}, 4),
    ([3.0, 2.0, 1.0], {"patience": 2, "mode": "min"}, None),
    ([0.1, NAN, NAN], {"patience": 2}, 3),
    ([NAN, 0.1, 0.2], {"patience": 2}, None),
])  # fmt: skip
def test_so_many_validations_without_an_improvement_end_a_run(values, options, expected) -> None:
    assert stops_at(values, **options) == expected


@pytest.mark.parametrize(
    ("metric", "mode", "sign"),
    [("zeroshot/top1", "auto", 1), ("validation loss", "auto", -1), ("median_rank", "auto", -1), ("loss", "max", 1)],
)
def test_auto_knows_what_is_better_by_the_name(metric, mode, sign) -> None:
    assert EarlyStop(metric, mode=mode).sign == sign


# ---- in a run: values by the step, so that a resumed run gets those of the whole one

SHARES = {1: 0.1, 2: 0.5, 3: 0.3, 4: 0.4, 5: 0.9}
STOP = ["eval.every=1", "eval.stop={metric: share, patience: 2}"]


@pytest.fixture
def shares(monkeypatch):
    """Validation that gives SHARES in turn, from any step on."""
    place = {"step": 0}

    def start(step: int = 0) -> None:
        place["step"] = step

    def validate(model: Any) -> dict[str, float]:
        place["step"] += 1
        return {"share": SHARES[place["step"]]}

    monkeypatch.setattr("contrastive.pretrain.validation", lambda *_: validate)
    monkeypatch.setattr("contrastive.preflight.SCALARS", ("share",))
    return start


def run_folder(config) -> Path:
    return Path(config.run.dir)


def rows(config) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_folder(config) / "metrics.jsonl").read_text().splitlines()]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_the_final_model_is_the_last_one(make_config, shares) -> None:
    config = make_config(*STOP, "checkpoint.every=1", "checkpoint.keep=9")
    results = pretrain(config, quiet=True)
    assert [row["step"] for row in rows(config) if "train/loss" in row] == [1, 2, 3, 4]
    folder = run_folder(config)
    assert same(weights(folder / "model"), weights(folder / "checkpoints" / "step_4"))
    reason = "stopped early at step 4, share has not risen in 2 validations since 0.5 at step 2"
    assert results and results["model"] == {"step": 4, "choice": "last", "weights": "raw", "stopped_early": reason}


@pytest.mark.parametrize("ema", [[], ["optim.ema={decay: 0.9}"]], ids=["raw", "ema"])
def test_or_the_best_one_where_it_was_kept_by_the_same_metric(make_config, shares, ema) -> None:
    config = make_config(*STOP, *ema, "checkpoint.keep_best=share", "checkpoint.every=null", "checkpoint.keep=1")
    results = pretrain(config, quiet=True)
    folder = run_folder(config)
    assert sorted(path.name for path in (folder / "checkpoints").glob("step_*")) == ["step_2", "step_4"]
    best = weights(folder / "checkpoints" / "step_2")
    if ema:
        average = load_file(folder / "checkpoints" / "step_2" / "ema.safetensors")
        best |= {key: value for key, value in average.items() if key in best}
    assert same(weights(folder / "model"), best)
    assert results and (results["model"]["step"], results["model"]["choice"]) == (2, "best")


def test_a_best_one_that_is_damaged_is_told_and_the_last_one_taken(make_config, shares, capsys) -> None:
    config = make_config(*STOP, "checkpoint.keep_best=share")
    pretrain(config, quiet=True)
    folder = run_folder(config) / "checkpoints"
    (folder / "step_2" / "model.safetensors").write_bytes(b"")
    results = pretrain(config, resume=True, quiet=True)  # it had ended: only the evaluation is done again
    assert "step_2, cannot be taken (model.safetensors has 0 bytes" in capsys.readouterr().out
    assert results and (results["model"]["step"], results["model"]["choice"]) == (4, "last")


def test_a_whole_run_ends_with_its_last_model_also_where_a_better_one_was_kept(make_config, shares) -> None:
    config = make_config(*STOP, "checkpoint.keep_best=share", "train.steps=4")
    results = pretrain(config, quiet=True)
    assert results and results["model"] == {"step": 4, "choice": "last", "weights": "raw", "stopped_early": None}


def test_the_output_says_where_it_stopped_and_which_model_it_kept(corpus, tmp_path, capsys) -> None:
    recipe = write_recipe(corpus, tmp_path / "tiny.yaml")
    still = ["optim.lr=1e-30", "optim.weight_decay=0.0", "eval.stop={metric: zeroshot/top1, patience: 2}"]
    options = [f"run.dir={tmp_path}/run", "eval.every=1", "checkpoint.keep_best=zeroshot/top1", *still]
    assert main(["train", str(recipe), *options]) == 0
    said = capsys.readouterr()
    assert "stopped early at step 3: zeroshot/top1 has not risen in 2 validations since" in said.err
    assert "(the best, step 1; stopped early at step 3, zeroshot/top1 has not risen" in said.out


# ---- resumed


@pytest.mark.parametrize("stop", [1, 2, 3])
@pytest.mark.parametrize("saves", ["checkpoint.every=1", "checkpoint.every=null"])
def test_the_counts_go_on_over_a_resume(make_config, shares, stop, saves) -> None:
    config = make_config(*STOP, saves, "checkpoint.keep=9")
    pretrain(config, stop_after=stop, quiet=True)
    shares(stop - 1)  # the validation behind the step at which a run is stopped is the resumed run's
    pretrain(config, resume=True, quiet=True)
    found = [(row["step"], row["validation/share"]) for row in rows(config) if "validation/share" in row]
    assert found == [(step, SHARES[step]) for step in (1, 2, 3, 4)]


@pytest.mark.parametrize("killed", ["before the validation", "behind it"])
def test_a_kill_around_a_validation_neither_loses_nor_repeats_it(make_config, shares, monkeypatch, killed) -> None:
    class Killed(BaseException):
        pass

    from contrastive.training.trainer import Trainer

    plain = Trainer._validate

    def validate(self: Trainer, *arguments: Any) -> None:
        if self.step == 3 and killed == "before the validation":
            raise Killed
        plain(self, *arguments)
        if self.step == 3:
            raise Killed

    config = make_config(*STOP, "checkpoint.every=1", "checkpoint.keep=9")
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_validate", validate)
        with pytest.raises(Killed):
            pretrain(config, quiet=True)
    shares(2)
    pretrain(config, resume=True, quiet=True)
    assert [row["step"] for row in rows(config) if "validation/share" in row] == [1, 2, 3, 4]
    assert max(row["step"] for row in rows(config)) == 4


def test_more_patience_takes_up_a_run_that_had_ended(make_config, shares) -> None:
    options = ["eval.every=1", "train.steps=5", "checkpoint.every=null"]
    pretrain(make_config(*options, "eval.stop={metric: share, patience: 2}"), quiet=True)
    results = pretrain(make_config(*options, "eval.stop={metric: share, patience: 4}"), resume=True, quiet=True)
    assert results and results["model"]["step"] == 5 and results["model"]["stopped_early"] is None


# ---- several processes, mistakes


def on_ranks(rank: int, world: int, corpus: Path, run_dir: Path) -> tuple[bool, int]:
    from contrastive import preflight
    from contrastive import pretrain as room
    from contrastive.training import Trainer

    values = iter(SHARES.values())
    room.validation, preflight.SCALARS = lambda *_: lambda model: {"share": next(values)}, ("share",)
    trainers = []
    made = Trainer.__init__

    def noted(self: Trainer, *arguments: Any, **options: Any) -> None:
        made(self, *arguments, **options)
        trainers.append(self)

    Trainer.__init__ = noted
    complete = room.pretrain(tiny_config(corpus, run_dir / "run", *STOP), quiet=True) is not None
    return complete, trainers[0].step


def test_two_processes_stop_behind_the_same_step(corpus, tmp_path) -> None:
    assert run_ranks(2, on_ranks, corpus, tmp_path) == [(True, 4), (True, 4)]


def test_a_metric_that_validation_does_not_give_is_told_with_those_it_gives(make_config) -> None:
    config = make_config("eval.stop.metric=top1", "eval.every=2")
    with pytest.raises(UserError, match=r"eval.stop.metric: 'top1'; validation gives .*zeroshot/top1"):
        pretrain(config, quiet=True)
    assert not Path(config.run.dir).exists()  # before the first step, not behind the first validation


@pytest.mark.parametrize(("options", "words"), [
    (["eval.stop.metric=x"], "eval.stop: x is told by validations during the run; set eval.every"),
    (["eval.stop={metric: x, mode: min}", "eval.every=1", "checkpoint.keep_best=x"], "keeps the largest x"),
])  # fmt: skip
def test_what_cannot_work_is_refused(make_config, options, words) -> None:
    with pytest.raises(UserError, match=words):
        make_config(*options)

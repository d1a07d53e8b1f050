"""Trackers by name: what reaches a service's package, and what is said when there is none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from contrastive.build import build_accelerator
from contrastive.errors import UserError
from contrastive.pretrain import pretrain
from contrastive.training import read_metrics
from tests.distributed.spawn import PATIENCE

ROOT = Path(__file__).resolve().parents[2]
STUB = """
import json, os
def note(*what):
    with open(os.environ["NOTES"], "a") as file:
        file.write(json.dumps(what) + chr(10))
class Run:
    def log(self, values, step=None, **_):
        note("log", step, values)
    def finish(self):
        note("finish")
def init(**options):
    note("init", options)
    return Run()
def finish():
    note("finish")
"""


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_whose_package_is_missing_is_refused_by_name(make_config, name):
    with pytest.raises(UserError, match=f"track.with: {name} is not installed here"):
        build_accelerator(make_config(f"track.with=[tensorboard, {name}]"))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_every_row_reaches_the_package_under_the_name_of_the_run(corpus, tmp_path, name):
    (tmp_path / "packages" / f"{name}-1.0.dist-info").mkdir(parents=True)
    (tmp_path / "packages" / f"{name}-1.0.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: 1.0\n")
    (tmp_path / "packages" / f"{name}.py").write_text(STUB)
    script = f"""
from pathlib import Path
from contrastive.pretrain import pretrain
from tests.tiny import tiny_config
overrides = ["track.with=[tensorboard, {name}]", "track.log_every=2", "train.steps=4"]
pretrain(tiny_config(Path({str(corpus)!r}), Path({str(tmp_path)!r}) / "mine", *overrides), quiet=True)
"""
    environment = {**os.environ, "NOTES": str(tmp_path / "notes"), "PYTHONPATH": f"{ROOT}:{tmp_path / 'packages'}"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    begin, *logged, end = [json.loads(line) for line in (tmp_path / "notes").read_text().splitlines()]
    assert begin == ["init", {"project": "contrastive", "name": "mine"}] and end == ["finish"]
    rows = [
        row for row in read_metrics(tmp_path / "mine" / "metrics.jsonl") if "train/loss" in row or "probe/loss" in row
    ]
    assert [one[1] for one in logged] == [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [one[2] for one in logged] == [{key: v for key, v in row.items() if key != "step"} for row in rows]
    assert list((tmp_path / "mine" / "tensorboard").rglob("events.*"))


def test_the_utilisation_is_the_rate_times_the_operations_over_the_peak(make_config):
    config = make_config("track.mfu=true", "train.steps=2", "model.text.depth=0", "model.text.heads=4")
    pretrain(config, quiet=True)
    for row in read_metrics(Path(config.run.dir) / "metrics.jsonl")[:2]:
        used = row["train/pairs_per_second"] * row["train/flops_per_pair"]
        assert row["train/mfu"] == pytest.approx(used / row["train/peak_flops"]) and 0 < row["train/mfu"] < 1

"""The main job through the command line: from a recipe to a model, a results file and a report."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import contrastive
from contrastive.cli import main
from contrastive.pretrain import STOPPED
from tests.distributed.spawn import PATIENCE
from tests.tiny import write_corpus, write_recipe


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def recipe(corpus, tmp_path) -> list[str]:
    """The arguments that train the tiny recipe into ``tmp_path/run``."""
    return [str(write_recipe(corpus, tmp_path / "tiny.yaml")), f"run.dir={tmp_path}/run"]


def run_command(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=environment)


def errors(capsys) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line]


def test_a_run_leaves_a_model_results_curves_and_a_report(recipe, corpus, tmp_path, capsys):
    assert main(["train", *recipe, "eval.report=true", "track.with=[tensorboard]", "eval.every=4"]) == 0
    run = tmp_path / "run"
    printed = capsys.readouterr().out
    assert "zero-shot, top-1" in printed and str(run / "report.html") in printed
    results = json.loads((run / "results.json").read_text())
    assert results["sets"]["validation"]["samples"] == 40 and results["seconds"]["training"] > 0
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]  # every step, and validation at 4 and 8
    assert list((run / "tensorboard").rglob("events.*"))
    assert "<html" in (run / "report.html").read_text()
    model = contrastive.load(run, device="cpu")
    assert contrastive.ZeroShotClassifier(model, ["red square", "blue square"]).predict(
        [corpus / "images" / "000.png"]
    )[0] in {"red square", "blue square"}


def test_print_config_is_a_recipe_that_reads_back_equal(recipe, tmp_path, capsys):
    assert main(["train", *recipe, "optim.lr=3e-4", "--print-config"]) == 0
    (tmp_path / "printed.yaml").write_text(first := capsys.readouterr().out)
    assert main(["train", str(tmp_path / "printed.yaml"), "--print-config"]) == 0
    assert capsys.readouterr().out == first and "lr: 0.0003" in first


def test_the_saved_configuration_runs_again(recipe, tmp_path):
    assert main(["train", *recipe]) == 0
    assert main(["train", f"{tmp_path}/run/config.yaml", f"run.dir={tmp_path}/again"]) == 0
    first, again = ((tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("run", "again"))
    assert first == again


def test_a_dry_run_trains_nothing_and_names_missing_data(recipe, tmp_path, capsys):
    assert main(["train", *recipe, "data.train=nowhere", "--dry-run"]) == 0
    assert "nowhere: NOT FOUND" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_the_recipe_for_many_gpus_builds_its_model_in_a_dry_run(capsys):
    assert main(["train", "recipes/pretrain/vit-b-32.yaml", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "image tower  87.8 M" in printed and "text tower   63.4 M" in printed


@pytest.mark.parametrize(("change", "words"), [
    (["model.image.img_size=48"], "model.image.img_size: unknown key"),
    (["train.global_batch=41"], "41 is more than the 40 pairs"),
    (["data.train=nowhere"], "nowhere"),
    (["train.precision=fp16"], "fp16 needs an accelerator"),
    (["track.with=[nonsense]"], "track.with: no tracker is called nonsense; accelerate knows"),
    (["track.with=[nonsense]", "--dry-run"], "track.with: no tracker is called nonsense"),
    (["eval.every=2", "eval.stop.metric=top1", "--dry-run"], "eval.stop.metric: 'top1'; validation gives"),
    (["train.accum_freq=4"], "train.chunk gives these"),
    (["--resume"], "no checkpoint"),
    (["--resume", "--overwrite"], "--resume and --overwrite: give one of them"),
    (["--resume", "--auto-resume"], "--resume and --auto-resume: give one of them"),
])  # fmt: skip
def test_a_mistake_is_one_line_and_exit_code_2(recipe, capsys, change, words):
    assert main(["train", *recipe, *change]) == 2
    lines = errors(capsys)
    assert len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0]


@pytest.mark.parametrize(("found", "program"), [
    (str(Path(sys.executable).with_name("contrastive")), ["contrastive"]),
    ("/of/another/environment/contrastive", [sys.executable, "-m", "contrastive"]),
    (None, [sys.executable, "-m", "contrastive"]),
])  # fmt: skip
def test_a_run_that_was_stopped_prints_the_command_to_go_on_with(recipe, capsys, monkeypatch, found, program):
    monkeypatch.setattr(shutil, "which", lambda name: found)
    monkeypatch.setattr("contrastive.pretrain.pretrain", lambda *_, **__: None)
    assert main(["train", *recipe, "train.steps=3", "--allow-pipe"]) == STOPPED
    words = capsys.readouterr().out.split()
    assert words[: 4 + len(program)] == ["go", "on", "with:", *program, "train"]
    assert words[-3:] == ["train.steps=3", "--allow-pipe", "--resume"]


def test_a_run_that_resumes_says_so_and_leaves_no_empty_folder(recipe, capsys):
    assert main(["train", *recipe]) == 0
    assert main(["train", *recipe, "--resume"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("resume  behind step") == 1
    folder = Path(recipe[1].removeprefix("run.dir="))
    assert (folder / "model").is_dir() and not (folder / "stacks").exists()


def test_a_loss_that_is_no_number_stops_the_run(recipe, capsys):
    assert main(["train", *recipe, "optim.lr=1e30", "optim.clip=null", "optim.warmup=0", "train.steps=30"]) == 2
    assert "optim.lr" in errors(capsys)[-1]


@pytest.mark.parametrize("launcher", [
    ["torch.distributed.run", "--nproc-per-node", "2"],
    # without a GPU the flag means: start the ranks
    ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
     "--mixed_precision", "no", "--dynamo_backend", "no"],
])  # fmt: skip
def test_a_launcher_runs_the_same_command(recipe, tmp_path, launcher):
    # a free port, since several test processes may launch at once
    port = ["--master-port" if "torch" in launcher[0] else "--main_process_port", str(20000 + os.getpid() % 20000)]
    command = [sys.executable, "-m", *launcher, *port, "-m", "contrastive", "train", *recipe]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 processes x 8" in done.stdout
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["sets"]["validation"]["samples"] == 40


def test_a_batch_that_does_not_divide_names_those_that_do(recipe):
    port = str(20000 + (os.getpid() + 7) % 20000)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port]
    command += ["-m", "contrastive", "train", *recipe, "train.global_batch=15"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode != 0
    assert "15 is not divisible by 2 processes; use 14 or 16" in done.stderr

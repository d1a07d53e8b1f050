"""Compiled towers: the losses of plain ones to rounding, plain names on the disk, and runs that go on either way."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.exc import BackendCompilerFailed

import contrastive
from contrastive.errors import UserError
from contrastive.pretrain import pretrain
from contrastive.training.compiling import compile_towers
from tests.distributed.spawn import run_ranks
from tests.tiny import tiny_config, write_corpus

pytestmark = pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="no C++ compiler")
BASE = ["data.validation=null", "train.steps=6", "optim.warmup=0"]
# rounding of fused kernels in float32, which six steps of AdamW carry on
CLOSE = 2e-4


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def test_a_compiled_run_has_the_losses_of_a_plain_one_and_its_names_and_each_goes_on_as_the_other(corpus, tmp_path):
    runs = {}
    for name, kinds in (("plain", ("none", "none")), ("compiled", ("towers", "towers")), ("mixed", ("towers", "none")),
                        ("later", ("none", "towers"))):  # fmt: skip
        for kind, stop in zip(kinds, (3, None), strict=True):
            config = tiny_config(corpus, tmp_path / name, *BASE, f"train.compile={kind}")
            pretrain(config, resume=stop is None, stop_after=stop, quiet=True)
        runs[name] = losses(tmp_path / name)
        assert runs[name] == pytest.approx(runs["plain"], abs=CLOSE)
        for file in ("checkpoints/step_6/model", "checkpoints/step_6/optimizer", "model/model"):
            found, expected = (load_file(tmp_path / one / f"{file}.safetensors") for one in (name, "plain"))
            assert found.keys() == expected.keys()
            assert {key: value.shape for key, value in found.items()} == {k: v.shape for k, v in expected.items()}
    assert runs["compiled"] != runs["plain"] or torch.equal(  # something was compiled, or rounding is the same
        *(
            load_file(tmp_path / one / "model/model.safetensors")["text.embedding.weight"]
            for one in ("plain", "compiled")
        )
    )
    assert contrastive.load(tmp_path / "compiled", device="cpu").dim == 16


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    ["optim.ema={decay: 0.5}"],
    ["train.curriculum=[{until: 3, size: 8, context: 4, patch_dropout: 0.5}]"],
    ["model.image.lora={targets: [fc1]}", "model.text.unfreeze_at=2"],
], ids=lambda options: options[0].partition("=")[0])  # fmt: skip
def test_compiled_towers_go_with(options, corpus, tmp_path):
    for kind in ("none", "towers"):
        pretrain(tiny_config(corpus, tmp_path / kind, *BASE, *options, f"train.compile={kind}"), quiet=True)
    assert losses(tmp_path / "towers") == pytest.approx(losses(tmp_path / "none"), abs=CLOSE)


def _train(rank: int, world: int, corpus: Path, folder: Path, kind: str) -> None:
    pretrain(tiny_config(corpus, folder / kind, *BASE, f"train.compile={kind}"), quiet=True)


@pytest.mark.slow
def test_compiled_towers_go_with_two_processes(corpus, tmp_path):
    for kind in ("none", "towers"):
        run_ranks(2, _train, corpus, tmp_path, kind, timeout=900)
    assert losses(tmp_path / "towers") == pytest.approx(losses(tmp_path / "none"), abs=CLOSE)


def test_a_missing_compiler_is_said_before_training(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    if torch.accelerator.is_available():
        pytest.skip("an accelerator needs no C++ compiler")
    with pytest.raises(UserError, match="train.compile: no C"):
        compile_towers(torch.nn.Module())


def test_a_tower_that_torch_cannot_compile_runs_without_and_says_so_once(monkeypatch, capsys):
    class Tower(torch.nn.Module):
        def features(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    def fail(x: torch.Tensor) -> torch.Tensor:
        raise BackendCompilerFailed("inductor", RuntimeError("no luck"), None)

    monkeypatch.setattr(torch, "compile", lambda function: fail)
    model = torch.nn.Module()
    model.image, model.text = Tower(), Tower()
    compile_towers(model)
    for _ in range(2):
        assert torch.equal(model.image.features(torch.ones(2)), torch.full((2,), 2.0))
    assert capsys.readouterr().err.count("note: train.compile: torch cannot compile the image tower for [2]") == 1

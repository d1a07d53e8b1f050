"""What only an accelerator can show: run it on a machine with one GPU, `python -m pytest tests/test_cuda.py`."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from contrastive.losses import dcl, infonce, margin, siglip
from contrastive.pretrain import pretrain
from tests.tiny import tiny_config, write_corpus, write_recipe

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
EXACT = ["model.image.kwargs.proj_drop_rate=0.0", "model.text.dropout=0.0"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(autouse=True)
def another_precision() -> None:
    """accelerate keeps the first precision of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def deterministic() -> Iterator[None]:
    """What torch asks for where a run is to be repeated bit for bit on CUDA; slower."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "run" / "model" / "model.safetensors")


@pytest.mark.parametrize("loss", [infonce, dcl, siglip, margin], ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("tile", [None, 100, "auto"])
def test_gradients_on_the_device_are_those_of_float64(loss, tile) -> None:
    generator = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(300, 32, generator=generator), dim=1) for _ in range(2))

    def gradients(device: str, dtype: torch.dtype, tile) -> list[torch.Tensor]:
        leaves = [x.detach().to(device, dtype).requires_grad_() for x in (image, text)]
        scale, bias = (torch.tensor(v, device=device, dtype=dtype, requires_grad=True) for v in (14.3, -5.0))
        found = loss(*leaves, scale, bias, tile=tile)["loss"]
        return [g.double().cpu() for g in torch.autograd.grad(found, [*leaves, scale, bias])]

    for found, expected in zip(
        gradients("cuda", torch.float32, tile), gradients("cpu", torch.float64, None), strict=True
    ):
        assert float((found - expected).norm()) <= 2e-5 * max(float(expected.norm()), 1e-6)


@pytest.mark.parametrize(
    "options", [[], ["train.chunk=5"], ["train.precision=fp16"], ["train.precision=bf16"]], ids=str
)
def test_a_resumed_run_has_the_weights_of_one_that_was_not_stopped(
    deterministic: None, corpus: Path, tmp_path: Path, options
) -> None:
    pretrain(tiny_config(corpus, tmp_path / "whole" / "run", *options), quiet=True)
    parts = tiny_config(corpus, tmp_path / "parts" / "run", *options)
    for stop, resume in ((3, False), (6, True), (None, True)):
        pretrain(parts, stop_after=stop, resume=resume, quiet=True)
    found, expected = weights(tmp_path / "parts"), weights(tmp_path / "whole")
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_chunks_train_as_the_whole_batch(corpus: Path, tmp_path: Path) -> None:
    # without dropout, which another division of the batch draws otherwise
    found = []
    for name, chunk in (("whole", "null"), ("chunks", "5")):
        pretrain(tiny_config(corpus, tmp_path / name / "run", *EXACT, f"train.chunk={chunk}"), quiet=True)
        found.append(losses_of(tmp_path / name / "run"))
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def losses_of(run_dir: Path) -> list[float]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def test_the_device_trains_as_the_cpu_does(corpus: Path, tmp_path: Path) -> None:
    recipe = write_recipe(corpus, tmp_path / "tiny.yaml")

    def losses(name: str, devices: str) -> list[float]:
        run_dir = tmp_path / name
        command = [sys.executable, "-m", "contrastive", "train", str(recipe), f"run.dir={run_dir}", *EXACT]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": devices}
        subprocess.run(command, check=True, env=environment, capture_output=True, timeout=120)
        return losses_of(run_dir)

    assert losses("device", "0") == pytest.approx(losses("cpu", ""), rel=1e-3)

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


# ---- the clock


def test_the_clock_sees_what_the_device_does_and_not_what_the_host_queues() -> None:
    """Phases of known length on the device, queued within a moment: the shares are those of the device."""
    from contrastive.training.clock import Clock

    device = torch.device("cuda")
    matrix = torch.randn(4096, 4096, device=device)
    clock = Clock(device)
    for _ in range(2):  # the first time warms up
        torch.cuda.synchronize()
        clock.start()
        for phase, products in (("forward", 20), ("backward", 40), ("optimizer", 20)):
            clock.enter(phase)
            for _ in range(products):
                matrix @ matrix
        clock.enter("other")
        found = clock.shares()
    assert found["forward"] == pytest.approx(0.25, abs=0.05) and found["backward"] == pytest.approx(0.5, abs=0.05)
    assert sum(found.values()) == pytest.approx(1.0)


def test_a_wait_of_the_host_counts_as_far_as_the_device_has_nothing_to_do() -> None:
    import time

    from contrastive.training.clock import Clock

    clock = Clock(torch.device("cuda"))
    matrix = torch.randn(4096, 4096, device="cuda")
    matrix @ matrix
    torch.cuda.synchronize()
    clock.start()
    clock.enter("backward")
    for _ in range(40):  # some 0.1 s
        matrix @ matrix
    clock.enter("data")
    time.sleep(0.02)  # hidden
    clock.enter("forward")
    hidden = clock.shares()
    assert hidden["backward"] > 0.95
    with clock.within("data"):
        time.sleep(0.1)
    assert clock.shares()["data"] > 0.9


def test_the_clock_makes_no_step_wait_for_the_device(corpus: Path, tmp_path: Path, monkeypatch) -> None:
    """torch tells of every call that waits; a run whose clock does nothing has as many."""
    import warnings

    from contrastive.training.clock import PHASES, Clock
    from contrastive.training.curriculum import StagedBatches

    def waits(name: str) -> list[int]:
        counts: list[int] = []
        plain = StagedBatches.fetch

        def fetch(*place):
            counts.append(len(caught))
            return plain(*place)

        monkeypatch.setattr(StagedBatches, "fetch", fetch)
        config = tiny_config(
            corpus, tmp_path / name / "run", "train.steps=10", "track.log_every=10", "track.probe=null"
        )
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                pretrain(config, quiet=True, stop_after=9)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            monkeypatch.setattr(StagedBatches, "fetch", plain)
        return [after - before for before, after in zip(counts, counts[1:], strict=False)]

    found = waits("with")
    monkeypatch.setattr(Clock, "enter", lambda self, phase: None)
    monkeypatch.setattr(Clock, "shares", lambda self: dict.fromkeys(PHASES, 0.0))
    without = waits("without")
    print("waits in each step:", found)
    assert found == without and len(found) == 8


def test_a_run_logs_shares_a_probe_and_its_utilisation(corpus: Path, tmp_path: Path) -> None:
    overrides = ["track.mfu=true", "track.probe_every=1", "train.chunk=8", "train.precision=bf16"]
    pretrain(tiny_config(corpus, tmp_path / "run", *overrides), quiet=True)
    found = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for row in found[:8]:
        print({key: round(value, 4) for key, value in row.items() if "time_" in key or "mfu" in key})
        assert sum(value for key, value in row.items() if key.startswith("train/time_")) == pytest.approx(1.0)
        assert 0 < row["train/mfu"] < 1 and row["probe/loss"] > 0 and row["train/peak_flops"] > 1e13

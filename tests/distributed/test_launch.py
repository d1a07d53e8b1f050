"""What starts a run on several processes: torchrun, alone and as two nodes, and its restarts."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.spawn import PATIENCE
from tests.tiny import write_corpus, write_recipe

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = ["data.validation=null", "checkpoint.every=2", "train.steps=30"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    return write_recipe(write_corpus(folder), folder / "tiny.yaml")


def environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    # torch 2.14 leaves the addresses of the processes before in the store that it shares, where gloo looks them up
    own_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return kept | own_store | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def torchrun(*options: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", *options, "-m", "contrastive", "train"]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "model" / "model.safetensors")


def same(one: Path, two: Path) -> bool:
    found, expected = weights(one), weights(two)
    return all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.fixture(scope="module")
def one_node(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("one") / "run"
    command = [*torchrun("--standalone", "--nproc-per-node", "2"), str(recipe), f"run.dir={run_dir}", *OPTIONS]
    subprocess.run(command, check=True, env=environment(), capture_output=True, timeout=PATIENCE)
    return run_dir


def test_two_nodes_with_a_rendezvous_of_their_own_are_one_run(recipe: Path, tmp_path: Path, one_node: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    nodes = []
    for _ in range(2):
        place = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "job"]
        command = [*torchrun(*place, "--rdzv-endpoint", f"127.0.0.1:{port}"), str(recipe), f"run.dir={tmp_path}/run"]
        nodes.append(subprocess.Popen([*command, *OPTIONS], env=environment(), stderr=subprocess.PIPE))
    assert [node.wait(timeout=PATIENCE) for node in nodes] == [0, 0]
    assert same(tmp_path / "run", one_node)


def test_torchrun_restarts_a_run_that_lost_a_process_and_it_goes_on_by_itself(
    recipe: Path, tmp_path: Path, one_node: Path
) -> None:
    run_dir = tmp_path / "run"
    place = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "2"]
    command = [*torchrun(*place), str(recipe), f"run.dir={run_dir}", *OPTIONS]
    run = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + PATIENCE
    while not list(run_dir.glob("checkpoints/step_*")):
        assert time.monotonic() < deadline and run.poll() is None
        time.sleep(0.005)
    victims = [pid for pid in processes(run.pid) if b"contrastive" in command_of(pid)]
    os.kill(victims[-1], signal.SIGKILL)
    assert run.wait(timeout=PATIENCE) == 0
    assert same(run_dir, one_node)
    steps = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == 30


def processes(parent: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(stat.parent.name))
        except OSError:
            continue
    return sorted(found)


def command_of(pid: int) -> bytes:
    return (Path("/proc") / str(pid) / "cmdline").read_bytes()

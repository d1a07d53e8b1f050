"""Shards that are commands: nothing runs unless the command line says so."""

import argparse
import os
import time
from pathlib import Path

import pytest

from contrastive.cli import train
from contrastive.errors import UserError
from contrastive.shards import PairLoader, open_index, write_shards
from contrastive.shards import storage as storage_module
from contrastive.shards.storage import ShardUnavailable, configure, expand, local_path
from tests.shards.conftest import lengths, records


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("ALLOW_PIPE", "REMOTE_STALL", "REMOTE_RETRIES", "REMOTE_DEADLINE"):
        monkeypatch.setenv(f"CONTRASTIVE_{name}", "")  # so that it is put back
    monkeypatch.setenv("CONTRASTIVE_REMOTE_WAIT", "0.05")
    monkeypatch.setenv("CONTRASTIVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(storage_module, "_failed", {})
    return tmp_path / "cache"


def canary(tmp_path: Path) -> tuple[str, Path]:
    return f"pipe:touch {tmp_path}/sang; cat {tmp_path}/x.tar", tmp_path / "sang"


@pytest.mark.parametrize("ask", [local_path, expand, open_index, lambda shard: open_index([shard])])
def test_without_permission_a_pipe_is_an_error_and_nothing_runs(tmp_path: Path, ask: object) -> None:
    pipe, sang = canary(tmp_path)
    with pytest.raises(UserError, match=r"^pipe:touch …: .* runs a command on this machine; say --allow-pipe"):
        ask(pipe)  # type: ignore[operator]
    time.sleep(0.2)
    assert not sang.exists()


def recipe(tmp_path: Path, pipe: str, more: str = "") -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"data: {{train: '{pipe}'{more}}}\nrun: {{dir: {tmp_path}/run}}\ntrain: {{steps: 1}}\n")
    return path


def run_train(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    return train.run(parser.parse_args([str(argument) for argument in arguments]))


@pytest.mark.parametrize("more", ["", ", allow_pipe: true"])
def test_a_recipe_cannot_allow_pipes(tmp_path: Path, more: str) -> None:
    pipe, sang = canary(tmp_path)
    with pytest.raises(UserError, match="allow.pipe"):
        run_train(recipe(tmp_path, pipe, more), "--dry-run")
    assert not sang.exists()


def test_the_flag_of_the_command_line_allows_pipes(tmp_path: Path) -> None:
    pipe, sang = canary(tmp_path)
    with pytest.raises(UserError, match="exit code 1"):  # of cat: there is no such tar
        run_train(recipe(tmp_path, pipe), "--dry-run", "--allow-pipe")
    assert sang.exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_with_permission_the_output_of_the_command_is_the_shard(tmp_path: Path, workers: int) -> None:
    configure(allow_pipe=True)
    write_shards(records(4), tmp_path / "shards")
    index = open_index([f"pipe:cat {tmp_path}/shards/00000.tar"])
    loader = PairLoader(index, tokenize=lengths, image_size=16, augment=None, global_batch=4, steps=1, workers=workers)
    (batch,) = loader
    assert batch.valid.all() and sorted(batch.keys) == [f"sample-{i:03d}" for i in range(4)]


def test_a_command_that_fails_is_no_shard_even_if_it_printed_one(tmp_path: Path, cache: Path) -> None:
    configure(allow_pipe=True, retries=1)
    with pytest.raises(
        ShardUnavailable, match=r"^pipe:echo …: OSError: the command ended with exit code 3 \(attempts: 2"
    ):
        local_path("pipe:echo looks good; exit 3")
    assert {path.suffix for path in (cache / "shards").iterdir()} == {".lock"}


def test_a_command_that_hangs_is_killed_with_what_it_started() -> None:
    configure(allow_pipe=True, retries=0, stall_seconds=1.0)
    with pytest.raises(ShardUnavailable, match="no byte for 1 s"):
        local_path("pipe:(sleep 61) | cat")
    time.sleep(0.2)
    running = [Path(f"/proc/{entry}/cmdline") for entry in os.listdir("/proc") if entry.isdigit()]
    assert not any(b"sleep\x0061" in path.read_bytes() for path in running if path.exists())

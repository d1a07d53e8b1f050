"""Gradients that are no numbers, ranks that do not fit together, another number of ranks."""

import json
from pathlib import Path

import pytest
import torch

from .faulty import STEPS, ends, same, seen, steps_saved, weights


def errors(run_dir: Path, world: int = 2) -> list[str | None]:
    return [json.loads((run_dir / f"ended-{rank}.json").read_text())["error"] for rank in range(world)]


def rows(run_dir: Path) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (run_dir / "run" / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if "train/seconds" in row]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_step_whose_gradient_is_nan_on_one_rank_changes_nothing_on_any_and_is_counted(
    tmp_path: Path, corpus: Path, undisturbed: Path, rank: int
) -> None:
    assert ends(
        2, tmp_path, corpus, "checkpoint.every=1", "checkpoint.keep=99", fault=("not_a_number", ([5], rank))
    ) == [0, 0]
    assert errors(tmp_path) == [None, None]
    assert [row["train/skipped_steps"] for row in rows(tmp_path)] == [0.0] * 5 + [1.0] * 7
    folder = tmp_path / "run" / "checkpoints"
    before, after, later = (weights_of(folder / f"step_{n}") for n in (5, 6, 7))
    assert same(before, after) and not same(after, later)
    assert all(value.isfinite().all() for value in weights(tmp_path).values())
    assert not same(weights(tmp_path), weights(undisturbed))


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    from contrastive.training.checkpoint import _load

    return _load(path, "model")


def test_so_many_of_them_in_a_row_stop_the_run_and_only_in_a_row(tmp_path: Path, corpus: Path) -> None:
    fault = ("not_a_number", ([1, 3, 4, 6, 7, 8], 1))
    assert ends(2, tmp_path, corpus, "optim.max_skipped=3", fault=fault) == [0, 0]
    found = errors(tmp_path)
    assert found[0] == found[1]
    assert "the gradients of 3 steps in a row, up to step 9, were not finite" in str(found[0])
    assert steps_saved(tmp_path) == ["step_3", "step_6"]


def test_the_count_goes_on_over_a_resume(tmp_path: Path, corpus: Path) -> None:
    fault = ("not_a_number", ([4, 5, 6, 7], 0))
    assert ends(2, tmp_path, corpus, "optim.max_skipped=4", fault=fault) == [0, 0]
    # from step 6, of which two were skipped in a row: the next two are the third and fourth
    assert ends(2, tmp_path, corpus, "optim.max_skipped=4", fault=("not_a_number", ([0, 1], 0))) == [0, 0]
    assert "the gradients of 4 steps in a row, up to step 8" in str(errors(tmp_path)[0])


@pytest.mark.parametrize(
    ("key", "told"),
    [("run.seed", "seed: 0' on process 0, 'seed: 1' on process 1"), ("optim.lr", "'lr: 0.0' on process 0, 'lr: 1.0'")],
)
def test_ranks_with_different_recipes_are_refused_at_the_start(
    tmp_path: Path, corpus: Path, key: str, told: str
) -> None:
    assert ends(2, tmp_path, corpus, fault=("other_recipe", key)) == [0, 0]
    found = errors(tmp_path)
    assert found[0] == found[1] and "the processes were started with different recipes" in str(found[0])
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_run_goes_on_with_two_one_and_four_processes(tmp_path: Path, corpus: Path) -> None:
    # dropout draws from each process's own stream; batches are the same all the same
    exact = ["model.image.kwargs.proj_drop_rate=0.0", "model.text.dropout=0.0", "optim.warmup=0"]
    alone = tmp_path / "alone"
    assert ends(1, alone, corpus, *exact) == [0]
    parts = tmp_path / "parts"
    for world, stop in ((2, 4), (1, 8), (4, None)):
        fault = None if stop is None else ("signal_at", (15, stop - 1, [0]))
        assert ends(world, parts, corpus, *exact, fault=fault) == [0] * world
    found, whole = rows(parts), seen(alone, 1)
    assert [row["train/loss"] for row in found] == pytest.approx(
        [whole[step][0][1] for step in sorted(whole)], rel=1e-3
    )
    for step in range(1, STEPS + 1):
        keys = [key for rank in range(4) for key in keys_of(parts, rank, step)]
        assert set(keys) == set(whole[step][0][0])


def keys_of(run_dir: Path, rank: int, step: int) -> list[str]:
    path = run_dir / f"seen-{rank}.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [key for line in lines if line["step"] == step for key in line["keys"]]


def test_a_weight_that_is_not_finite_stops_both_ranks_and_is_not_saved(tmp_path: Path, corpus: Path) -> None:
    options = ["optim.lr=1e39", "optim.clip=null", "optim.warmup=0", "checkpoint.every=1"]
    assert ends(2, tmp_path, corpus, *options) == [0, 0]
    assert all("not finite after step 1; nothing was saved" in str(error) for error in errors(tmp_path))
    assert not steps_saved(tmp_path)

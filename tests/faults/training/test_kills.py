"""Killed at any moment, on two ranks, a run ends with the weights of the run that was not: bit for bit."""

import signal
from pathlib import Path

import pytest

from contrastive.pretrain import STOPPED

from .faulty import STEPS, ends, same, seen, steps_saved, weights


def assert_as_if_nothing_had_happened(run_dir: Path, undisturbed: Path) -> None:
    """The same pairs and losses at every step, the same weights at the end, nothing left aside."""
    found, expected = seen(run_dir), seen(undisturbed)
    assert sorted(found) == list(range(1, STEPS + 1))
    assert found == expected
    assert same(weights(run_dir), weights(undisturbed))
    left = [path.name for path in (run_dir / "run" / "checkpoints").iterdir() if path.name.startswith(".partial")]
    assert not left and not list((run_dir / "run" / "stacks").glob("*"))


@pytest.mark.slow
def test_all_ranks_killed_before_every_step_of_the_run(tmp_path: Path, corpus: Path, undisturbed: Path) -> None:
    for number in range(STEPS):
        fault = ("signal_at", (signal.SIGKILL, number, [0, 1]))
        # a checkpoint that was still being written is lost with its process: an earlier one serves
        assert ends(2, tmp_path, corpus, "checkpoint.every=1", fault=fault) == [-9, -9]
    assert ends(2, tmp_path, corpus, "checkpoint.every=1") == [0, 0]
    assert_as_if_nothing_had_happened(tmp_path, undisturbed)


@pytest.mark.parametrize("number", [0, 5, 11])
def test_all_ranks_killed_before_a_step(tmp_path: Path, corpus: Path, undisturbed: Path, number: int) -> None:
    assert ends(2, tmp_path, corpus, fault=("signal_at", (signal.SIGKILL, number, [0, 1]))) == [-9, -9]
    assert ends(2, tmp_path, corpus) == [0, 0]
    assert_as_if_nothing_had_happened(tmp_path, undisturbed)


@pytest.mark.parametrize("victim", [0, 1])
def test_one_rank_killed_ends_the_other_and_the_run_goes_on(
    tmp_path: Path, corpus: Path, undisturbed: Path, victim: int
) -> None:
    codes = ends(2, tmp_path, corpus, fault=("signal_at", (signal.SIGKILL, 7, [victim])))
    assert codes[victim] == -9 and codes[1 - victim] > 0
    assert ends(2, tmp_path, corpus) == [0, 0]
    assert_as_if_nothing_had_happened(tmp_path, undisturbed)


def test_killed_in_the_middle_of_a_save(tmp_path: Path, corpus: Path, undisturbed: Path) -> None:
    assert ends(2, tmp_path, corpus, fault=("signal_in_save", signal.SIGKILL))[0] == -9
    assert ends(2, tmp_path, corpus) == [0, 0]
    assert_as_if_nothing_had_happened(tmp_path, undisturbed)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_stopped_ends_the_other_with_its_stacks_on_disk(
    tmp_path: Path, corpus: Path, undisturbed: Path, victim: int
) -> None:
    codes = ends(2, tmp_path, corpus, "train.step_timeout=15", fault=("stop_process", (7, victim)), stuck=victim)
    assert codes[1 - victim] == 1 and codes[victim] == -9  # the stopped one is killed by its launcher
    stacks = (tmp_path / "run" / "stacks" / f"rank_{1 - victim}.txt").read_text()
    assert "Timeout" in stacks and "trainer.py" in stacks
    (tmp_path / "run" / "stacks" / f"rank_{victim}.txt").unlink(missing_ok=True)
    assert ends(2, tmp_path, corpus) == [0, 0]
    assert_as_if_nothing_had_happened(tmp_path, undisturbed)


def test_a_program_error_on_one_rank_ends_both_without_a_hang(tmp_path: Path, corpus: Path, undisturbed: Path) -> None:
    codes = ends(2, tmp_path, corpus, fault=("exception_at", (7, 1)))
    assert all(code > 0 for code in codes)
    assert ends(2, tmp_path, corpus) == [0, 0]
    assert_as_if_nothing_had_happened(tmp_path, undisturbed)


# ---- signals that ask


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], ids=lambda n: n.name)
@pytest.mark.parametrize("ranks", [[0], [1], [0, 1]], ids=str)
def test_a_signal_to_any_rank_stops_all_behind_the_step_with_a_checkpoint(
    tmp_path: Path, corpus: Path, undisturbed: Path, number: signal.Signals, ranks: list[int]
) -> None:
    assert ends(2, tmp_path, corpus, fault=("signal_at", (number, 4, ranks))) == [0, 0]
    # it came after the ranks had agreed on step 5, and holds for the one behind it
    assert steps_saved(tmp_path)[-1] == "step_6"
    assert ends(2, tmp_path, corpus) == [0, 0]
    assert_as_if_nothing_had_happened(tmp_path, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda n: n.name)
def test_a_signal_that_workers_get_too_does_not_end_them(
    tmp_path: Path, corpus: Path, undisturbed: Path, number: signal.Signals
) -> None:
    assert ends(2, tmp_path, corpus, "data.workers=1", fault=("signal_to_all", number)) == [0, 0]
    assert steps_saved(tmp_path)[-1] == "step_6"
    assert ends(2, tmp_path, corpus, "data.workers=1") == [0, 0]
    assert_as_if_nothing_had_happened(tmp_path, undisturbed)


def test_more_signals_change_nothing(tmp_path: Path, corpus: Path, undisturbed: Path) -> None:
    assert ends(2, tmp_path, corpus, fault=("signal_twice", 4)) == [0, 0]
    assert steps_saved(tmp_path)[-1] == "step_6"
    assert ends(2, tmp_path, corpus) == [0, 0]
    assert_as_if_nothing_had_happened(tmp_path, undisturbed)


def test_a_signal_in_a_save_lets_it_end(tmp_path: Path, corpus: Path, undisturbed: Path) -> None:
    # on a busy machine training has gone on to the next checkpoint by then, and two of them would prune this one
    keep = f"checkpoint.keep={STEPS}"
    assert ends(2, tmp_path, corpus, keep, fault=("signal_in_save", signal.SIGTERM)) == [0, 0]
    saved = steps_saved(tmp_path)
    assert saved[0] == "step_3" and saved[-1] != f"step_{STEPS}"
    assert ends(2, tmp_path, corpus) == [0, 0]
    assert_as_if_nothing_had_happened(tmp_path, undisturbed)


def test_a_signal_in_evaluation_stops_behind_the_next_step(tmp_path: Path, corpus: Path, undisturbed: Path) -> None:
    options = [f"data.validation={corpus}/shards", "eval.every=4"]
    assert ends(2, tmp_path, corpus, *options, fault=("signal_in_evaluation", signal.SIGTERM)) == [0, 0]
    assert steps_saved(tmp_path)[-1] == "step_5"
    assert ends(2, tmp_path, corpus, *options) == [0, 0]
    assert_as_if_nothing_had_happened(tmp_path, undisturbed)


def test_a_signal_in_the_final_evaluation_asks_for_a_restart_that_evaluates(
    tmp_path: Path, corpus: Path, undisturbed: Path
) -> None:
    assert ends(2, tmp_path, corpus, fault=("signal_in_final_evaluation", signal.SIGTERM)) == [STOPPED, 0]
    assert not (tmp_path / "run" / "results.json").exists()
    assert ends(2, tmp_path, corpus) == [0, 0]
    assert (tmp_path / "run" / "results.json").exists() and same(weights(tmp_path), weights(undisturbed))

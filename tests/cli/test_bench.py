"""``contrastive bench loader``: every part is measured, and the verdict follows from the figures."""

from pathlib import Path

import pytest

from contrastive.cli import main
from contrastive.loader_bench import _verdict
from contrastive.shards import write_shards
from tests.shards.conftest import records

PARTS = {"disk": 10_000.0, "decoding": 500.0, "decoding and transform": 400.0, "tokenizing": 5_000.0}


def test_shards_are_measured_part_by_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shards(records(20), tmp_path / "s")
    assert (
        main(["bench", "loader", str(tmp_path / "s"), "--seconds", "0.05", "--workers", "0", "1", "--size", "8"]) == 0
    )
    lines = capsys.readouterr().out.splitlines()
    names = [
        "disk",
        "decoding",
        "decoding and transform",
        "tokenizing",
        "the loader, 0 workers",
        "the loader, 1 worker",
    ]
    assert [line.split("  ")[1] for line in lines[:-1]] == names
    assert all(float(line.split()[-4].replace(",", "")) > 0 for line in lines[:-1])


def test_a_model_that_is_slower_than_the_loader_is_the_bottleneck() -> None:
    verdict = _verdict(PARTS, {0: 300.0, 1: 350.0}, model=100.0)
    assert (verdict.bottleneck, verdict.workers) == ("the model", 1)


def test_workers_wanted_are_the_models_pace_over_that_of_one_worker() -> None:
    # one worker: 1/10000 + 1/400 + 1/5000 s a sample, 357 a second
    verdict = _verdict(PARTS, {1: 350.0}, model=1000.0)
    assert (verdict.bottleneck, verdict.workers) == ("decoding", 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nowhere"], "nowhere"),
        (["X", "--seconds", "0"], "--seconds 0"),
        (["X", "--workers", "-1"], "-1"),
        (["X", "--seconds", "nan"], "--seconds nan"),
        (["X", "--size", "0"], "--size 0"),
    ],
)
def test_a_mistake_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    write_shards(records(4), tmp_path / "s")
    assert main(["bench", "loader", *[str(tmp_path / "s") if o == "X" else o for o in options]]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1

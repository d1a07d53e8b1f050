import argparse
from pathlib import Path

import pytest

from contrastive.cli import shard
from contrastive.errors import UserError
from contrastive.shards import open_index

from .conftest import VAL, encoded


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    shard.add_arguments(parser)
    return shard.run(parser.parse_args([str(argument) for argument in arguments]))


def test_a_table_is_sharded_and_summed_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(encoded(i))
    rows = ["0.png,cat", "1.png,cat", "2.png,", "9.png,dog"]
    (tmp_path / "x.csv").write_text("\n".join(["image,caption", *rows]))
    assert run(tmp_path / "x.csv", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "2 pairs in 1 shards" in printed
    assert "skipped: 1 (no caption)" in printed
    assert "skipped: 1 (no image)" in printed
    assert "occurred before: 1 (50.0%)" in printed


def test_limit_and_samples_per_shard_are_kept(tmp_path: Path) -> None:
    run(VAL, tmp_path / "out", "--limit", 10, "--samples-per-shard", 4)
    index = open_index(tmp_path / "out")
    assert (len(index), len(index.shards)) == (10, 3)


def test_captions_absent_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(encoded())
    with pytest.raises(UserError, match="nothing to write: 1 with no caption"):
        run(tmp_path / "images", tmp_path / "out")

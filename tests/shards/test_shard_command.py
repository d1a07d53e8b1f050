import argparse
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from contrastive.cli import main, shard
from contrastive.errors import UserError
from contrastive.shards import open_index, open_source, pools
from tests.distributed.spawn import PATIENCE

from ..tiny import tiny_config, write_corpus
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
    assert "2 pairs in 1 shard" in printed
    assert "skipped: 1 (no caption)" in printed
    assert "skipped: 1 (no such file)" in printed
    assert "occurred before: 1 (50.0%)" in printed


def test_limit_and_samples_per_shard_are_kept(tmp_path: Path) -> None:
    run(VAL, tmp_path / "out", "--limit", 10, "--samples-per-shard", 4)
    index = open_index(tmp_path / "out")
    assert (len(index), len(index.shards)) == (10, 3)


def test_captions_absent_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(encoded())
    with pytest.raises(UserError, match="nothing to write: the only row .*no caption"):
        run(tmp_path / "images", tmp_path / "out")


def test_filters_and_transforms_reach_the_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i, size in enumerate([(40, 30), (40, 30), (9, 9), (90, 10), (40, 30)]):
        (tmp_path / f"{i}.png").write_bytes(encoded(i, size))
    rows = ["0.png,a cat", "1.png,a", "2.png,a dog", "3.png,a long dog", "4.png,A cat"]
    (tmp_path / "x.csv").write_text("\n".join(["image,caption", *rows]))
    options = ["--min-size", 10, "--max-aspect", 3, "--min-caption", 2, "--deduplicate", "caption"]
    run(tmp_path / "x.csv", tmp_path / "out", *options, "--resize", 15, "--format", "jpeg", "--workers", 2)
    printed = capsys.readouterr().out
    for reason in ("image too small", "image too elongated", "caption too short", "duplicate caption"):
        assert f"skipped: 1 ({reason})" in printed
    with Image.open(io.BytesIO(open_index(tmp_path / "out").image(0))) as image:
        assert (image.format, image.size) == ("JPEG", (20, 15))


def test_the_score_of_a_model_decides(tmp_path: Path) -> None:
    from contrastive import embed, load
    from contrastive.pretrain import pretrain

    corpus = write_corpus(tmp_path / "corpus")
    pretrain(tiny_config(corpus, tmp_path / "run" / "a"))
    found = embed(load(tmp_path / "run" / "a"), corpus / "images")
    assert found.text is not None
    scores = (found.image * found.text).sum(1)
    minimum = float(sorted(scores)[15] + sorted(scores)[16]) / 2
    expected = [Path(key).stem for key, score in zip(found.keys, scores, strict=True) if score > minimum]
    for name, workers in {"one": 1, "two": 2}.items():
        options = ["--clip-score", f"{tmp_path}/run/a:{minimum}", "--samples-per-shard", 11, "--workers", workers]
        run(corpus / "images", tmp_path / name, *options)
        index = open_index(tmp_path / name)
        assert [index.key(i) for i in range(len(index))] == expected
    assert [p.read_bytes() for p in sorted((tmp_path / "one").glob("*.tar"))] == [
        p.read_bytes() for p in sorted((tmp_path / "two").glob("*.tar"))
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--clip-score", "runs/mine"], "give MODEL:MIN"),
        (["--clip-score", "runs/mine:2"], "give MODEL:MIN"),
        (["--workers", "0"], "--workers 0: give at least 1"),
        (["--workers", "2", "--ray"], "give one of them"),
        (["--deduplicate", "text"], "give caption, image or both"),
        (["--resize", "-1"], "--resize -1: give at least 1"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(["shard", str(VAL), str(tmp_path / "out"), *options]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_paths_outside_are_read_only_when_allowed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "out.png").write_bytes(encoded(0))
    (tmp_path / "data" / "in.png").write_bytes(encoded(1))
    (tmp_path / "data" / "x.csv").write_text("image,caption\n../out.png,a\nin.png,b\n")
    run(tmp_path / "data" / "x.csv", tmp_path / "a")
    assert "1 (path outside the table's folder; --allow-outside reads them)" in capsys.readouterr().out
    run(tmp_path / "data" / "x.csv", tmp_path / "b", "--allow-outside")
    assert len(open_index(tmp_path / "b")) == 2


def test_progress_is_lines_in_a_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = [SimpleNamespace(part=part) for part in open_source(VAL, limit=10).cut(4)]
    list(shard.watched(pools.run_here, every=0)(lambda job, task: None, None, tasks, "making shards"))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" rows")[0] for line in lines] == [f"making shards: {n} of 10" for n in (4, 8, 10)]
    assert "a second, 0 minutes left" in lines[-1]


def test_ctrl_c_ends_every_process_and_a_new_run_goes_on(tmp_path: Path) -> None:
    """In a process group of its own, as a terminal would send it."""
    command = [sys.executable, "-m", "contrastive", "shard", str(VAL), str(tmp_path / "out"), "--workers", "2"]
    command += ["--samples-per-shard", "2", "--resize", "20"]
    # a shell that starts the tests in the background has them ignore Ctrl-C, and what they start too
    child = subprocess.Popen(
        command, start_new_session=True, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + PATIENCE
    while not list(tmp_path.glob("out.unfinished/parts/*.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(child.pid, signal.SIGINT)
    _, said = child.communicate(timeout=PATIENCE)
    assert child.returncode == 130
    assert said.splitlines()[-1] == "interrupted" and "Traceback" not in said
    while (left := living(child.pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []
    assert not (tmp_path / "out").exists()
    made = len(list(tmp_path.glob("out.unfinished/parts/*.json")))
    assert 0 < made < 949
    assert main([*command[3:5], str(tmp_path / "out"), "--samples-per-shard", "2", "--resize", "20"]) == 0
    assert len(open_index(tmp_path / "out")) == 1898


def living(group: int) -> list[str]:
    """The processes of a group that run still."""
    stats = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            stats.append(path.read_text().rsplit(")", 1)[1].split())
        except OSError:  # it just ended
            continue
    return [" ".join(stat[:3]) for stat in stats if stat[2] == str(group) and stat[0] != "Z"]

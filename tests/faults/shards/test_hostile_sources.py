"""What a user's table or folder names may be anything: nothing hangs, nothing is swallowed, nothing is endless."""

import os
from pathlib import Path

import pytest

from contrastive.cli import main
from contrastive.errors import UserError
from contrastive.shards import open_source, write_shards

from .tars import image


def table(folder: Path, text: str) -> Path:
    (folder / "ok.png").write_bytes(image(0))
    path = folder / "pairs.csv"
    path.write_text(text)
    return path


@pytest.mark.parametrize("place", ["table", "folder"])
def test_a_fifo_is_counted_and_not_waited_for(tmp_path: Path, place: str) -> None:
    path = table(tmp_path, "image,caption\npipe.png,x\nok.png,y\n")
    (tmp_path / "ok.txt").write_text("y")
    (tmp_path / "pipe.txt").write_text("x")
    os.mkfifo(tmp_path / "pipe.png")
    source = open_source(path if place == "table" else [tmp_path / "ok.png"])
    if place == "folder":
        source = open_source(tmp_path)
    made = write_shards(source, tmp_path / "out")
    left_out = {".csv (a table: give it by name)": 1} if place == "folder" else {}
    assert (made.pairs, made.skipped) == (1, {**left_out, "not a regular file": 1})


def test_a_device_that_never_ends_is_counted_and_not_read(tmp_path: Path) -> None:
    made = write_shards(open_source(table(tmp_path, "image,caption\n/dev/zero,x\nok.png,y\n")), tmp_path / "out")
    assert (made.pairs, dict(made.skipped)) == (1, {"not a regular file": 1})


@pytest.mark.parametrize(
    "rows",
    [
        'ok.png,"never closed\n',
        'ok.png,"never closed\n' + "ok.png,caption\n" * 300,
        'ok.png,"closed too late\n' + "ok.png,caption\n" * 300 + 'ok.png,the end"\n',
        'ok.png,"closed, but in the next row\nok.png,the end"\n',
        'ok.png,"opened in each\nok.png,"of two rows\n',
    ],
    ids=["at the end", "over rows to the end", "over rows to another quote", "in the next row", "twice"],
)
def test_a_quote_that_is_not_closed_stops_instead_of_swallowing_rows(tmp_path: Path, rows: str) -> None:
    path = table(tmp_path, "image,caption\nok.png,first\n" + rows)
    with pytest.raises(UserError, match=r"pairs.csv: the row from line 3 on .*a quote .*is not closed"):
        list(open_source(path))


def test_captions_with_quotes_and_line_breaks_are_read_as_before(tmp_path: Path) -> None:
    path = table(tmp_path, 'image,caption\nok.png,"a ""large"" cat\nand a dog"\nok.png,a 5" pipe\n')
    assert [record.captions for record in open_source(path, group=False)] == [
        ('a "large" cat\nand a dog',),
        ('a 5" pipe',),
    ]


def test_a_link_that_leads_round_in_a_circle_is_gone_through_once(tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "deep" / "a.png").write_bytes(image(0))
    (tmp_path / "in" / "deep" / "a.txt").write_text("a")
    (tmp_path / "in" / "deep" / "round").symlink_to("..")
    (tmp_path / "in" / "b.png").write_bytes(image(1))
    (tmp_path / "in" / "b.txt").mkdir()  # a folder where a caption should be
    found = {record.key: record.captions for record in open_source(tmp_path / "in")}
    assert found == {"b.png": (), "deep/a.png": ("a",)}


@pytest.mark.parametrize("command", [["check"], ["bench", "loader"]], ids=["check", "bench"])
def test_a_set_without_one_readable_image_is_called_so(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(image(number)[:40])
        (tmp_path / f"{number}.txt").write_text(f"caption {number}")
    write_shards(open_source(tmp_path), tmp_path / "out")
    assert main([*command, str(tmp_path / "out")]) == 2
    assert "not one of the 4 images looked at can be decoded" in capsys.readouterr().err

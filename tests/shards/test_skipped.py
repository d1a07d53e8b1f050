import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from contrastive.cli import main
from contrastive.shards import Filters, make_shards, on_processes, open_index, open_source
from contrastive.shards.decode import MAX_PIXELS

from .conftest import encoded

IMAGES = [encoded(0), b"<html>", None, encoded(3)[:200], encoded(4, (3, 3)), encoded(5), encoded(6)]
CAPTIONS = ["a", "b", "c", "d", "e", "", "g"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    pq.write_table(pa.table({"image": IMAGES, "caption": CAPTIONS}), tmp_path / "x.parquet")
    return tmp_path / "x.parquet"


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rejected.jsonl").read_text(encoding="utf-8").splitlines()]


def test_every_skipped_row_is_a_line(tmp_path: Path, source: Path) -> None:
    made = make_shards(
        open_source(source), tmp_path / "out", samples_per_shard=2, filters=Filters(min_size=10), verify=True
    )
    found = lines(tmp_path / "out")
    assert [(int(line["key"]), line["reason"]) for line in found] == [
        (1, "unknown image format"),
        (2, "no image"),
        (3, "truncated or damaged"),
        (4, "image too small"),
        (5, "no caption"),
    ]
    assert all(line.keys() == {"key", "reason", "detail", "place"} for line in found)
    assert "<html>" in found[0]["detail"] and found[3]["detail"] == "3 x 3"
    assert made.pairs == 2 and sum(made.skipped.values()) == 5


def test_the_list_does_not_depend_on_processes_or_interruptions(tmp_path: Path, source: Path) -> None:
    options: dict[str, Any] = {"samples_per_shard": 2, "verify": True}
    make_shards(open_source(source), tmp_path / "one", **options)
    make_shards(open_source(source), tmp_path / "two", **options, runner=on_processes(2))

    def dies(function: Any, job: Any, tasks: Any, what: str) -> Any:
        for task in tasks:
            if task.part.number == 2:
                raise KeyboardInterrupt
            yield function(job, task)

    with pytest.raises(KeyboardInterrupt):
        make_shards(open_source(source), tmp_path / "three", **options, runner=dies)
    make_shards(open_source(source), tmp_path / "three", **options)
    texts = [(tmp_path / name / "rejected.jsonl").read_bytes() for name in ("one", "two", "three")]
    assert texts[0] == texts[1] == texts[2]


def test_a_score_that_is_too_low_stands_in_the_place_of_its_row(tmp_path: Path, source: Path) -> None:
    class Odd:
        minimum = 0.5

        def identity(self) -> str:
            return "odd"

        def prepare(self, image: Any) -> int:
            return int(np.asarray(image)[0, 0, 0])

        def score(self, images: Any, captions: Any) -> list[float]:
            return [float(caption != "a") for caption in captions]

    make_shards(open_source(source), tmp_path / "out", scorer=Odd())
    assert [int(line["key"]) for line in lines(tmp_path / "out")] == [0, 1, 2, 3, 5]
    assert lines(tmp_path / "out")[0]["reason"] == "score too low"


def test_no_file_where_nothing_is_skipped(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": IMAGES[:1], "caption": ["a"]}), tmp_path / "x.parquet")
    make_shards(open_source(tmp_path / "x.parquet"), tmp_path / "out")
    assert not (tmp_path / "out" / "rejected.jsonl").exists()


def test_the_command_names_the_list_and_the_folder_is_read_and_overwritten(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["shard", str(source), str(tmp_path / "out")]
    assert main(command) == 0
    assert f"skipped rows are listed in {tmp_path / 'out' / 'rejected.jsonl'}" in capsys.readouterr().out
    assert len(open_index(tmp_path / "out")) == len(open_source(tmp_path / "out")) == 4
    assert main([*command, "--overwrite", "--verify"]) == 0
    assert len(open_index(tmp_path / "out")) == 3  # what is cut off is found now


def test_pairs_that_an_index_left_out_are_listed_too(tmp_path: Path, source: Path) -> None:
    make_shards(open_source(source), tmp_path / "a")

    with tarfile.open(tmp_path / "a" / "00000.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("alone.txt"))
    made = make_shards(open_source(tmp_path / "a"), tmp_path / "b")
    assert made.skipped == {"no image": 1}
    assert lines(tmp_path / "b") == [{"key": "alone", "reason": "no image", "detail": None, "place": "00000.tar"}]


@pytest.mark.parametrize("damage", ["cut", "animated", "huge"])
def test_verify_finds_images_that_training_would_not_decode(tmp_path: Path, damage: str) -> None:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    if damage == "animated":
        frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
        frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:], duration=100)
    elif damage == "huge":
        Image.new("1", (MAX_PIXELS // 4000 + 1, 4000)).save(buffer, "PNG")
    data = encoded(1, format="JPEG")[:-300] if damage == "cut" else buffer.getvalue()
    reason = {"cut": "truncated or damaged", "animated": "animated", "huge": "too many pixels"}[damage]
    pq.write_table(pa.table({"image": [encoded(), data], "caption": ["a", "b"]}), tmp_path / "x.parquet")
    assert make_shards(open_source(tmp_path / "x.parquet"), tmp_path / "kept").pairs == 2
    made = make_shards(open_source(tmp_path / "x.parquet"), tmp_path / "verified", verify=True)
    assert made.skipped == {reason: 1}
    assert made.pairs == 1

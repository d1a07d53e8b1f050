import re
import runpy
import shutil
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from contrastive.shards import open_index

DATA = Path(__file__).parents[2] / "data"


def test_the_counts_of_the_pictograms_card_are_those_of_the_tables() -> None:
    card = (DATA / "pictograms" / "README.md").read_text()
    stated = {}
    for source, train, val in re.findall(r"^\| `([\w-]+)` \|.*\| ([\d,]*) ?\| ?([\d,]*) ?\|$", card, re.MULTILINE):
        stated[source] = int((train or val).replace(",", ""))
    found: Counter[str] = Counter()
    for split in ("train", "val"):
        found.update(pq.read_table(DATA / "pictograms" / f"{split}.parquet")["source"].to_pylist())
    assert stated == found


def test_no_style_of_the_validation_split_is_in_train() -> None:
    train, val = (
        set(pq.read_table(DATA / "pictograms" / f"{s}.parquet")["source"].to_pylist()) for s in ("train", "val")
    )
    assert val == {"twemoji"}
    assert not train & val


def test_the_counts_of_the_fashion_mnist_card_are_those_of_the_tables() -> None:
    card = (DATA / "fashion-mnist" / "README.md").read_text()
    rows = re.findall(r"^\| \d \| ([\w -]+) \| ([\d,]+) \| ([\d,]+) \|$", card, re.MULTILINE)
    for column, split in enumerate(("train", "test"), 1):
        stated = {row[0]: int(row[column].replace(",", "")) for row in rows}
        assert stated == Counter(pq.read_table(DATA / "fashion-mnist" / f"{split}.parquet")["label_name"].to_pylist())


@pytest.mark.parametrize(("name", "split"), [("pictograms", "val"), ("fashion-mnist", "test")])
def test_prepare_makes_shards_once(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, split: str) -> None:
    shutil.copy(DATA / name / "prepare.py", tmp_path)
    for table in (DATA / name).glob("*.parquet"):
        pq.write_table(pq.read_table(table).slice(0, 20), tmp_path / table.name)
    for message in ("20 pairs", "up to date"):
        runpy.run_path(str(tmp_path / "prepare.py"), run_name="__main__")
        assert capsys.readouterr().out.count(message) == 2
    index = open_index(tmp_path / "shards" / split)
    assert len(index) == 20
    if name == "fashion-mnist":
        assert index.record(0).captions == ("a photo of an ankle boot",)
        assert index.record(0).label == "ankle boot"

"""Rows with the same image are one record with several captions; captions and labels of Parquet files."""

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contrastive.errors import UserError
from contrastive.shards import grouping, make_shards, on_processes, open_index, open_source

from ..shards.conftest import encoded

DATA = Path(__file__).parent / "data"
KINDS = ("csv", "jsonl", "parquet")


def table(folder: Path, kind: str, rows: list[dict[str, Any]], name: str = "x") -> Path:
    """Rows as a table; the images 0.png to 4.png lie with it."""
    for number in range(5):
        (folder / f"{number}.png").write_bytes(encoded(number))
    path = folder / f"{name}.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    elif kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        path.write_text("\n".join(";".join(line) for line in [list(rows[0]), *(row.values() for row in rows)]))
    return path


def pairs(images: list[int]) -> list[dict[str, Any]]:
    return [{"image": f"{image}.png", "caption": f"words {row % 7}"} for row, image in enumerate(images)]


def expected(rows: list[dict[str, Any]]) -> dict[str, tuple[str, tuple[str, ...]]]:
    """By image: the number of its first row, and its captions in the order of the rows without repetitions."""
    found: dict[str, tuple[int, list[str]]] = {}
    for number, row in enumerate(rows):
        captions = found.setdefault(row["image"], (number, []))[1]
        if row["caption"] not in captions:
            captions.append(row["caption"])
    return {image: (f"{number:09d}", tuple(captions)) for image, (number, captions) in found.items()}


@settings(deadline=None, max_examples=40)
@given(
    first=st.lists(st.integers(0, 4), min_size=1, max_size=12),
    second=st.lists(st.integers(0, 4), max_size=8),
    kind=st.sampled_from(KINDS),
    size=st.integers(1, 4),
    limit=st.none() | st.integers(1, 4),
)
def test_captions_of_one_image_are_joined_in_any_order_of_rows_and_parts(
    tmp_path_factory: pytest.TempPathFactory, first: list[int], second: list[int], kind: str, size: int, limit: Any
) -> None:
    folder = tmp_path_factory.mktemp("grouped")
    rows = pairs([*first, *second])
    table(folder, kind, rows[: len(first)], "a")
    if second:
        table(folder, kind, rows[len(first) :], "b")
    source = open_source(f"{folder}/*.{kind}", limit=limit)
    found = list(source)
    wanted = list(expected(rows).items())[:limit]
    assert [(r.key, r.captions) for r in found] == [samples for _, samples in wanted]
    assert [r.image for r in found] == [encoded(int(image[0])) for image, _ in wanted]
    parts = source.cut(size)
    assert [record for part in parts for record in source.read(part)] == found
    assert [part.records for part in parts] == [len(list(source.read(part))) for part in parts]
    assert len(source) == len(found) and source.grouped == len(rows) - len(expected(rows))


@pytest.mark.parametrize("kind", KINDS)
def test_grouping_is_said_and_can_be_switched_off(tmp_path: Path, kind: str) -> None:
    path = table(tmp_path, kind, pairs([0, 0, 1, 0]))
    assert open_source(path).notes == ["grouped by image: 4 rows became 2 samples"]
    apart = open_source(path, group=False)
    assert (len(list(apart)), len(apart), apart.grouped, apart.notes) == (4, 4, 0, [])


def test_spellings_of_one_path_are_one_image(tmp_path: Path) -> None:
    names = ["0.png", "./0.png", str(tmp_path / "0.png"), f"../{tmp_path.name}/0.png", "1.png"]
    path = table(tmp_path, "csv", [{"image": name, "caption": f"{n}"} for n, name in enumerate(names)])
    assert [r.captions for r in open_source(path)] == [("0", "1", "2", "3"), ("4",)]


def test_equal_names_in_two_folders_are_two_images(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        table(tmp_path / name, "csv", [{"image": "0.png", "caption": name}])
    assert [r.captions for r in open_source(f"{tmp_path}/*/x.csv")] == [("a",), ("b",)]


def test_bytes_are_grouped_where_it_is_asked_for(tmp_path: Path) -> None:
    rows = [{"image": encoded(n), "caption": f"{row}"} for row, n in enumerate([0, 1, 0])]
    path = table(tmp_path, "parquet", rows)
    assert len(open_source(path)) == 3
    assert [r.captions for r in open_source(path, group=True)] == [("0", "2"), ("1",)]


def test_rows_of_one_image_must_agree_on_the_label(tmp_path: Path) -> None:
    labels = [("0", "cat"), ("0", ""), ("1", "cat"), ("2", ""), ("0", "cat"), ("1", "dog"), ("2", "bus")]
    path = table(
        tmp_path, "csv", [{"image": f"{image}.png", "caption": "x", "label": label} for image, label in labels]
    )
    found = [(r.label, r.fault, r.detail) for r in open_source(path)]
    assert found == [("cat", None, None), ("cat", grouping.DIFFERENT_LABELS, "cat, dog"), ("bus", None, None)]


def test_a_caption_that_cannot_be_read_is_not_hidden_by_grouping(tmp_path: Path) -> None:
    path = table(tmp_path, "csv", pairs([0, 0, 0]))
    path.write_bytes(path.read_bytes().replace(b"words 1", b"caf\xe9"))
    assert [(r.captions, r.fault) for r in open_source(path)] == [
        (("words 0", "words 2"), None),
        ((), "caption not UTF-8"),
    ]


def test_more_scattered_rows_than_memory_may_hold_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouping, "MAX_APART", 2)
    assert len(open_source(table(tmp_path, "csv", pairs([0, 0, 0, 0, 1, 0, 1])))) == 2
    path = table(tmp_path, "csv", pairs([0, 1, 0, 1, 0]))
    with pytest.raises(UserError, match="3 rows repeat the image.*limit: 2.*sort the table.*--no-group"):
        len(open_source(path))


def test_two_processes_write_the_captions_of_one(tmp_path: Path) -> None:
    draw = random.Random(0)
    rows = pairs([draw.randrange(5) for _ in range(20)])
    path = table(tmp_path, "csv", rows)
    made = make_shards(open_source(path), tmp_path / "out", samples_per_shard=2, runner=on_processes(2))
    index = open_index(tmp_path / "out")
    assert made.pairs == len(expected(rows)) == 5
    assert [index.record(i).captions for i in range(5)] == [captions for _, captions in expected(rows).values()]


# ---- captions and labels


def test_captions_that_are_json_lists_as_text_are_several() -> None:
    source = open_source(DATA / "parquet_list_as_string" / "t.parquet")
    assert [r.captions for r in source] == [(f"first {n}", f"second {n}") for n in range(6)]
    assert source.notes == ["captions: 6 rows hold a list written as text, which is read as several captions"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("text", "captions", "fault"),
    [
        ("""["a, b", "it's"]""", ("a, b", "it's"), None),
        ("""['a cat', "it's"]""", ("a cat", "it's"), None),
        ("['a cat' 'a dog']", (), "caption is a list written as text that cannot be read"),
        ("['a cat', 'a", ("['a cat', 'a",), None),
        ("[image] a cat", ("[image] a cat",), None),
        ("[1, 2]", ("[1, 2]",), None),
    ],
)
def test_text_that_is_a_list_is_read_as_one(
    tmp_path: Path, kind: str, text: str, captions: tuple[str, ...], fault: str | None
) -> None:
    rows = [{"image": "0.png", "caption": text}]
    if kind == "csv":
        rows[0]["caption"] = '"' + text.replace('"', '""') + '"'
    (record,) = open_source(table(tmp_path, kind, rows))
    assert (record.captions, record.fault) == (captions, fault)


@pytest.mark.parametrize(
    ("captions", "found", "fault"),
    [
        (["a", None, " b ", "a"], ("a", "b"), None),
        ([["a"], ["b"]], (), "caption is a list of lists"),
        ({"raw": "a"}, (), "caption is an object, not text"),
        (7, (), "caption is a number, not text"),
        (b"caf\xe9", (), "caption not UTF-8"),
        (b"plain", ("plain",), None),
        (float("nan"), (), None),
    ],
    ids=str,
)
def test_caption_cells_of_other_types(tmp_path: Path, captions: Any, found: Any, fault: str | None) -> None:
    (record,) = open_source(table(tmp_path, "parquet", [{"image": "0.png", "caption": captions}]))
    assert (record.captions, record.fault) == (found, fault)


def test_class_names_of_a_parquet_schema_are_the_labels() -> None:
    assert [r.label for r in open_source(DATA / "hub_classlabel_parquet" / "test.parquet")] == ["cat", "dog"] * 3


@pytest.mark.parametrize("kind", [pa.int8(), pa.int64(), pa.float64()], ids=str)
def test_numbers_of_classes_become_names_or_faults(tmp_path: Path, kind: Any) -> None:
    features = {
        "label": {"names": ["b", "a", "c"], "_type": "ClassLabel"},
        "fine": {"names": ["x"], "_type": "ClassLabel"},
    }
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    numbers = pa.array([2, 0, -1, None, 3], kind)
    columns = {"image": [encoded(0)] * 5, "label": numbers, "fine": [0] * 5}
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), tmp_path / "x.parquet")
    found = list(open_source(tmp_path / "x.parquet"))
    assert [r.label for r in found] == ["c", "b", None, None, None]
    assert [r.fault for r in found] == [None, None, None, None, "label is not the number of a class"]
    assert all(r.meta == {"fine": "x"} for r in found)


def test_files_of_which_only_one_names_its_classes_are_refused(tmp_path: Path) -> None:
    features = {"label": {"names": ["b", "a"], "_type": "ClassLabel"}}
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    columns = pa.table({"image": [encoded(0)], "label": [1]})
    pq.write_table(columns.replace_schema_metadata(metadata), tmp_path / "a.parquet")
    pq.write_table(columns, tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b\.parquet: only some files name the classes of column 'label'"):
        open_source(tmp_path)


def test_missing_labels_of_a_float_column_are_no_names(tmp_path: Path) -> None:
    labels = [1.0, float("nan"), None, 2.0, 2.5]
    path = table(tmp_path, "parquet", [{"image": f"{n}.png", "label": label} for n, label in enumerate(labels)])
    assert [r.label for r in open_source(path)] == ["1", None, None, "2", "2.5"]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_captions_are_not_grouped(tmp_path: Path, kind: str) -> None:
    path = table(tmp_path, kind, [{"image": f"{n}.png", "label": name} for n, name in ((0, "a"), (0, "b"), (1, "a"))])
    found = [(record.label, record.fault) for record in open_source(path)]
    assert found == [("a", None), ("b", None), ("a", None)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_path_with_backslashes_is_the_image_that_it_names(tmp_path: Path, kind: str) -> None:
    (tmp_path / "im").mkdir()
    (tmp_path / "im" / "0.png").write_bytes(encoded(0))
    spellings = ("im/0.png", "im\\0.png", ".\\im\\0.png")
    path = table(tmp_path, kind, [{"image": name, "caption": f"words {n}"} for n, name in enumerate(spellings)])
    assert [record.captions for record in open_source(path)] == [("words 0", "words 1", "words 2")]


def test_minus_one_is_a_class_in_a_plain_column_and_no_label_in_one_of_class_names(tmp_path: Path) -> None:
    rows = [{"image": "0.png", "label": -1}, {"image": "1.png", "label": 1}]
    path = table(tmp_path, "parquet", rows)
    assert [record.label for record in open_source(path)] == ["-1", "1"]
    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    schema = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(pa.Table.from_pylist(rows).replace_schema_metadata(schema), path)
    assert [record.label for record in open_source(path)] == [None, "dog"]

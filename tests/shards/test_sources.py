import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from contrastive.errors import UserError
from contrastive.shards import open_source, write_shards

from .conftest import VAL, encoded, records


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three image files in a folder."""
    (tmp_path / "images").mkdir()
    for i in range(3):
        (tmp_path / "images" / f"{i}.png").write_bytes(encoded(i))
    return tmp_path / "images"


def test_parquet_rows_become_records() -> None:
    source = open_source(VAL)
    row = pq.read_table(VAL).slice(0, 1).to_pylist()[0]
    first = next(iter(source))
    assert (source.kind, len(source), first.key, first.image) == ("parquet", 1898, row["key"], row["image"])
    assert first.captions[0] == row["caption"]
    assert set(first.captions) == set(row["captions"])
    assert first.meta == {"source": row["source"], "license": row["license"]}


def test_a_source_can_be_read_twice_and_limited() -> None:
    source = open_source(VAL, limit=300)
    assert [r.key for r in source] == [r.key for r in source]
    assert len(source) == len(list(source)) == 300


def test_the_name_of_a_label_is_preferred_to_its_number() -> None:
    source = open_source(VAL.parents[1] / "fashion-mnist" / "test.parquet", limit=5)
    first = next(iter(source))
    assert (first.label, first.captions, first.meta) == ("ankle boot", (), {})


def test_images_as_structs_of_bytes_are_read(tmp_path: Path) -> None:
    column = [{"bytes": encoded(i), "path": None} for i in range(2)]
    pq.write_table(pa.table({"image": column, "text": ["a", "b"], "label": [3, 4]}), tmp_path / "x.parquet")
    first, second = open_source(tmp_path / "x.parquet")
    assert (first.image, first.captions, first.label, second.label) == (encoded(0), ("a",), "3", "4")


def test_several_parquet_files_are_one_source(tmp_path: Path) -> None:
    for name in "ab":
        pq.write_table(pa.table({"image": [encoded()], "caption": [name]}), tmp_path / f"{name}.parquet")
    for path in (tmp_path, f"{tmp_path}/*.parquet", [tmp_path / "a.parquet", tmp_path / "b.parquet"]):
        source = open_source(path)
        assert [(r.key, r.captions) for r in source] == [("000000000", ("a",)), ("000000001", ("b",))]
        assert len(source) == 2


@pytest.mark.parametrize("separator", [",", "\t", ";", "|"])
def test_the_separator_of_a_csv_file_is_told(images: Path, separator: str) -> None:
    with open(images.parent / "x.csv", "w", newline="", encoding="utf-8-sig") as file:
        rows = csv.writer(file, delimiter=separator)
        rows.writerow(["Title", "File_Name", "class"])
        rows.writerow(["a cat, red; or | not\tso red", "images/0.png", "cat"])
        rows.writerow(['two\nlines "quoted"', str(images / "1.png"), ""])
    first, second = open_source(images.parent / "x.csv")
    assert (first.captions, first.image, first.label) == (
        ("a cat, red; or | not\tso red",),
        encoded(0),
        "cat",
    )
    assert (second.captions, second.image, second.label) == (('two\nlines "quoted"',), encoded(1), None)


def test_columns_can_be_named(images: Path) -> None:
    (images.parent / "x.csv").write_text("caption,english,picture\nhund,dog,images/2.png\n")
    (record,) = open_source(images.parent / "x.csv", image="picture", caption="english")
    assert (record.captions, record.image) == (("dog",), encoded(2))


def test_a_missing_column_lists_the_columns_found(images: Path) -> None:
    (images.parent / "x.csv").write_text("foo,bar\n1,2\n")
    with pytest.raises(UserError, match="no column looks like the image; name one of: foo, bar"):
        open_source(images.parent / "x.csv")
    with pytest.raises(UserError, match="no column 'text' for the caption; columns: foo, bar"):
        open_source(images.parent / "x.csv", image="foo", caption="text")


def test_a_missing_file_is_a_record_without_image(images: Path) -> None:
    (images.parent / "x.csv").write_text("image,caption\nimages/0.png,here\nimages/9.png,gone\n,nothing\n")
    assert [r.image is None for r in open_source(images.parent / "x.csv")] == [False, True, True]


def test_json_lines_become_records(images: Path) -> None:
    rows = [
        {
            "key": "x",
            "image": "images/0.png",
            "captions": ["one", "two"],
            "license": "MIT",
            "size": 3,
            "odd": None,
        },
        {"key": "y", "image": "images/1.png", "captions": []},
    ]
    path = images.parent / "x.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    first, second = open_source(path)
    assert (first.key, first.image, first.captions) == ("x", encoded(0), ("one", "two"))
    assert first.meta == {"license": "MIT", "size": 3}
    assert second.captions == ()


def test_a_bad_json_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"image": "a.png"}\n{"image": \n')
    with pytest.raises(UserError, match="line 2 is not JSON"):
        list(open_source(tmp_path / "x.jsonl"))


def test_sidecars_are_captions(images: Path) -> None:
    (images / "0.txt").write_text("first\n\nsecond\n")
    (images / "sub").mkdir()
    (images / "sub" / "x.JPG").write_bytes(encoded(format="JPEG"))
    (images / "sub" / "x.txt").write_text("deep")
    found = [(r.key, r.captions, r.label) for r in open_source(images)]
    assert found == [
        ("0.png", ("first\n\nsecond",), None),
        ("1.png", (), None),
        ("2.png", (), None),
        ("sub/x.JPG", ("deep",), None),
    ]


def test_shards_of_a_folder_have_keys_without_the_extension(images: Path, tmp_path: Path) -> None:
    for i in range(3):
        (images / f"{i}.txt").write_text("a caption")
    write_shards(open_source(images), tmp_path / "shards")
    assert [r.key for r in open_source(tmp_path / "shards")] == ["0", "1", "2"]


def test_class_folders_are_labels(tmp_path: Path) -> None:
    for name in ("dog/1.png", "cat/2.png", "cat/old/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(encoded())
    found = [(r.key, r.captions, r.label) for r in open_source(tmp_path)]
    assert found == [("cat/2.png", (), "cat"), ("cat/old/3.png", (), "cat"), ("dog/1.png", (), "dog")]


def test_a_plain_folder_and_image_files_have_neither(images: Path) -> None:
    for path in (images, f"{images}/*.png", [images / f"{i}.png" for i in range(3)]):
        source = open_source(path)
        assert (source.kind, len(source)) == ("images", 3)
        assert [(r.key, r.captions, r.label) for r in source] == [(f"{i}.png", (), None) for i in range(3)]


def test_shards_are_a_source(tmp_path: Path) -> None:
    write_shards(records(5), tmp_path / "a", samples_per_shard=2)
    for path in (tmp_path / "a", f"{tmp_path}/a/*.tar"):
        assert list(open_source(path)) == records(5)
    assert len(open_source(tmp_path / "a" / "00002.tar")) == 1


def test_wrong_paths_end_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.docx").touch()
    (tmp_path / "x.csv").touch()
    (tmp_path / "x.parquet").write_bytes(b"no table")
    for name, message in {
        "absent": "no such file or folder",
        "*.png": "no such file or folder",
        "empty": "no images, tables",
        "x.docx": "unknown kind of file",
        "x.csv": "empty",
        "x.parquet": "not a Parquet file",
        "x.*": "unknown kind|several kinds",
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            open_source(f"{tmp_path}/{name}")
        assert "\n" not in str(caught.value)


def test_naming_a_column_of_an_image_folder_is_an_error(images: Path) -> None:
    with pytest.raises(UserError, match="columns can be named for a table only"):
        open_source(images, caption="text")


def test_a_row_that_is_not_utf8_is_counted_and_its_line_is_named(tmp_path: Path) -> None:
    for name, text in {
        "a.csv": "image,caption\n0.png,plain\n0.png,café\n",
        "b.jsonl": '\n{"image": "0.png", "caption": "plain"}\n{"image": "0.png", "caption": "café"}\n',
    }.items():
        (tmp_path / "0.png").write_bytes(encoded())
        (tmp_path / name).write_bytes(text.encode("latin-1"))
        source = open_source(tmp_path / name)
        first, second = source
        assert (first.fault, second.fault) == (None, "caption not UTF-8")
        assert second.place == f"{tmp_path / name}: line 3"
        assert any("line 3 not UTF-8" in note for note in source.notes)


def test_names_of_columns_that_are_not_utf8_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("image,légende\n0.png,x\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"a\.csv: line 1 .*not UTF-8"):
        open_source(tmp_path / "a.csv")

"""Annotations beside a folder of images: metadata of imagefolder layouts, COCO's captions, Karpathy's splits."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from contrastive.cli import main
from contrastive.errors import UserError
from contrastive.shards import open_index, open_source

from .small import DATA, picture, write_files


@pytest.mark.parametrize("name", ["imagefolder_metadata_csv", "imagefolder_metadata_jsonl"])
def test_the_metadata_of_the_cases_gives_the_captions(name: str) -> None:
    source = open_source(DATA / name)
    assert len(source) == 6 and all(record.image and record.captions for record in source)


def metadata(kind: str, rows: list[dict[str, Any]]) -> bytes:
    if kind == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    names = list(rows[0])
    return "\n".join([",".join(names), *(",".join(str(row[name]) for name in names) for row in rows)]).encode()


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("column", ["caption", "text", "label"])
def test_metadata_gives_captions_and_labels_and_counts_the_images_that_it_does_not_name(
    tmp_path: Path, kind: str, column: str
) -> None:
    rows = [{"file_name": f"sub/{i}.jpg", column: f"value {i}"} for i in range(3)]
    files = {f"sub/{i}.jpg": picture(i) for i in range(5)} | {f"metadata.{kind}": metadata(kind, rows), "x.pdf": b"x"}
    source = open_source(write_files(tmp_path, files))
    found = [(record.image, record.label if column == "label" else record.captions[0]) for record in source]
    assert found == [(picture(i), f"value {i}") for i in range(3)]
    assert source.rejected == {f"image that metadata.{kind} does not name": 2, ".pdf": 1}


def test_metadata_gives_several_captions_an_image(tmp_path: Path) -> None:
    row = {"file_name": "0.jpg", "captions": ["one", "two"]}
    (record,) = open_source(write_files(tmp_path, {"0.jpg": picture(1), "metadata.jsonl": metadata("jsonl", [row])}))
    assert record.captions == ("one", "two")


def test_metadata_in_each_split_is_that_of_the_split(tmp_path: Path) -> None:
    for split in ("train", "test"):
        rows = metadata("csv", [{"file_name": "0.jpg", "caption": split}])
        write_files(tmp_path / split, {"0.jpg": picture(1), "metadata.csv": rows})
    with pytest.raises(UserError, match="several splits: train, test"):
        open_source(tmp_path)
    (record,) = open_source(tmp_path, split="test")
    assert record.captions == ("test",)


def test_metadata_without_captions_or_labels_leaves_the_class_folders(tmp_path: Path) -> None:
    rows = metadata("csv", [{"file_name": "cat/0.jpg", "width": 16}])
    source = open_source(
        write_files(tmp_path, {"cat/0.jpg": picture(1), "dog/0.jpg": picture(2), "metadata.csv": rows})
    )
    assert [record.label for record in source] == ["cat", "dog"]
    assert source.rejected == {".csv (a table: give it by name)": 1}


def test_metadata_beside_caption_files_is_an_error(tmp_path: Path) -> None:
    rows = metadata("csv", [{"file_name": "0.jpg", "caption": "from the table"}])
    write_files(tmp_path, {"0.jpg": picture(1), "0.txt": b"from the file", "metadata.csv": rows})
    with pytest.raises(UserError, match=r"metadata\.csv: the folder holds \.txt captions too; give the table by name"):
        open_source(tmp_path)
    (record,) = open_source(tmp_path / "metadata.csv")
    assert record.captions == ("from the table",)


def coco(count: int, draw: random.Random) -> tuple[dict[str, Any], dict[str, tuple[str, ...]]]:
    """Annotations in COCO's layout, in a random order, and the captions of each image."""
    images = [{"id": 7 * i + 1, "file_name": f"COCO_val2014_{i:06d}.jpg", "height": 12} for i in range(count)]
    captions = {image["file_name"]: [f"{image['id']} {j}" for j in range(draw.randint(1, 5))] for image in images}
    notes = [{"image_id": image["id"], "caption": text} for image in images for text in captions[image["file_name"]]]
    order = {name: [] for name in captions}
    draw.shuffle(notes)
    names = {image["id"]: image["file_name"] for image in images}
    for number, note in enumerate(notes):
        note["id"] = number
        order[names[note["image_id"]]].append(note["caption"])
    return {"images": images, "annotations": notes}, {name: tuple(texts) for name, texts in order.items()}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("file", "images"),
    [
        ("annotations/captions_val2014.json", "val2014/"),
        ("captions_val2014.json", "val2014/"),
        ("captions.json", "images/"),
        ("captions.json", ""),
        ("annotations/captions_val2014.json", "images/val2014/"),
    ],
)
def test_captions_of_coco_are_read_from_the_images_near_them(tmp_path: Path, file: str, images: str, seed: int) -> None:
    value, captions = coco(4, random.Random(seed))
    files = {f"{images}{name}": picture(i) for i, name in enumerate(captions)}
    write_files(tmp_path, files | {file: json.dumps(value).encode()})
    found = {record.key: record.captions for record in open_source(tmp_path / file)}
    assert found == captions and all(record.image for record in open_source(tmp_path / file))


def test_the_shard_command_makes_one_sample_of_each_image_of_coco(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    value, captions = coco(3, random.Random(0))
    write_files(tmp_path / "photos", {name: picture(i) for i, name in enumerate(captions)})
    write_files(tmp_path, {"coco.json": json.dumps(value).encode()})
    command = ["shard", str(tmp_path / "coco.json"), str(tmp_path / "out")]
    assert main(command) == 2
    assert "no image COCO_val2014_000000.jpg in " in (error := capsys.readouterr().err) and "--images FOLDER" in error
    assert main([*command, "--images", str(tmp_path / "photos")]) == 0
    index = open_index(tmp_path / "out")
    assert {f"{record.key}.jpg": record.captions for record in map(index.record, range(3))} == captions


def test_images_that_coco_names_and_nobody_has_are_faults_with_the_path(tmp_path: Path) -> None:
    value, captions = coco(3, random.Random(0))
    first, *others = captions
    write_files(tmp_path, {first: picture(1), "c.json": json.dumps(value).encode()})
    records = list(open_source(tmp_path / "c.json"))
    assert [record.fault for record in records] == [None, "no such file", "no such file"]
    assert [str(tmp_path / name) for name in others] == [record.detail for record in records[1:]]


def test_what_coco_holds_without_use_is_counted(tmp_path: Path) -> None:
    value = {
        "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2}],
        "annotations": [{"image_id": "1", "caption": " a "}, {"image_id": 1}, {"image_id": 9, "caption": "?"}],
    }
    write_files(tmp_path, {"a.jpg": picture(1), "c.json": json.dumps(value).encode()})
    source = open_source(tmp_path / "c.json")
    assert [record.captions for record in source] == [("a",)]
    assert source.rejected == {
        "annotation without a caption": 1,
        "image without file_name": 1,
        "caption of an image that is not listed": 1,
    }


def test_a_path_out_of_the_folder_of_images_is_a_fault(tmp_path: Path) -> None:
    value = {
        "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "../b.jpg"}],
        "annotations": [{"image_id": 1, "caption": "a"}, {"image_id": 2, "caption": "b"}],
    }
    write_files(tmp_path, {"in/a.jpg": picture(1), "b.jpg": picture(2), "in/c.json": json.dumps(value).encode()})
    faults = [record.fault for record in open_source(tmp_path / "in" / "c.json", allow_outside=False)]
    assert faults == [None, "path outside the folder of images"]
    assert [record.fault for record in open_source(tmp_path / "in" / "c.json")] == [None, None]


def karpathy(splits: list[str]) -> dict[str, Any]:
    sentences = [{"raw": " A cat. ", "tokens": ["a", "cat"]}, {"tokens": ["two", "cats"]}]
    images = [
        {"filepath": "val2014", "filename": f"{i}.jpg", "split": split, "sentences": sentences}
        for i, split in enumerate(splits)
    ]
    return {"images": images, "dataset": "coco"}


@pytest.mark.parametrize("file", ["dataset_coco.json", "annotations/dataset_coco.json"])
def test_splits_of_karpathy_are_read_one_by_one(tmp_path: Path, file: str) -> None:
    splits = ["train", "val", "test", "restval", "train"]
    images = {f"val2014/{i}.jpg": picture(i) for i in range(len(splits))}
    write_files(tmp_path, images | {file: json.dumps(karpathy(splits)).encode()})
    with pytest.raises(UserError, match=r"several splits: train, val, test, restval; .*--split train .*train\+restval"):
        open_source(tmp_path / file)
    train = open_source(tmp_path / file, split="train")
    assert [(record.key, record.captions) for record in train] == [
        (f"val2014/{i}.jpg", ("A cat.", "two cats")) for i in (0, 4)
    ]
    assert train.notes == [
        "1 images of the split restval are not read, which models are usually trained on too: "
        "--split train+restval reads both"
    ]
    assert len(open_source(tmp_path / file, split="train+restval")) == 3
    assert train.identity() != open_source(tmp_path / file, split="val").identity()
    with pytest.raises(UserError, match="--split nothing: .* holds train, val, test, restval"):
        open_source(tmp_path / file, split="nothing")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"images": [{"id": 1}], "annotations": [{"image_id": 1, "bbox": [0, 0, 1, 1]}]}',
            "COCO's boxes, without captions",
        ),
        ('{"images": [{"id": 1}], "annotations": []}', "an unknown layout; give COCO's captions"),
        ('{"data": [1, 2]}', "an unknown layout; of .json files COCO's captions"),
        ('[{"image": "a.jpg", "caption": "a"}]', r"a JSON list is not read; .*jq -c '\.\[\]' x.json > x.jsonl"),
        ('{"image": "a.jpg"}\n{"image": "b.jpg"}\n', "not one JSON value .*name it .jsonl"),
        ("{", "not one JSON value"),
        ('{"images": []}', "an unknown layout"),
    ],
)
def test_other_json_is_an_error_that_says_what_is_read(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=f"x.json: {message}") as error:
        open_source(tmp_path / "x.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "latin-1"])
def test_the_encoding_of_json_is_told(tmp_path: Path, encoding: str) -> None:
    value = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "caption": "Müsli"}]}
    write_files(tmp_path, {"a.jpg": picture(1)})
    (tmp_path / "x.json").write_text(json.dumps(value, ensure_ascii=False), encoding=encoding)
    if encoding == "latin-1":
        with pytest.raises(UserError, match=r"x\.json: not UTF-8; save it as UTF-8"):
            open_source(tmp_path / "x.json")
    else:
        assert [record.captions for record in open_source(tmp_path / "x.json")] == [("Müsli",)]

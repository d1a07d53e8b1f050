"""Every row of the table "Kinds of input" in docs/shards.md, with an input of its kind."""

import base64
import json
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from contrastive.errors import UserError
from contrastive.shards import Record, open_source

from .small import picture, write_files, write_tar

PAGE = (Path(__file__).parents[2] / "docs" / "shards.md").read_text(encoding="utf-8")
SECTION = PAGE.split("## Kinds of input\n", 1)[1].split("\n## ", 1)[0]
ROWS = [row.split(" | ")[0] for row in re.findall(r"^\| (.*) \|$", SECTION, re.MULTILINE)][1:]
IMAGES = {"a.jpg": picture(1), "b.jpg": picture(2)}
CAPTIONS = [("a",), ("b",)]
checks: dict[str, Callable[[Path], None]] = {}


def holds(row: str) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    """Names the row of the table that a check holds."""

    def note(check: Callable[[Path], None]) -> Callable[[Path], None]:
        checks[row] = check
        return check

    return note


def read(path: object, **options: object) -> list[Record]:
    return list(open_source(path, **options))  # type: ignore[arg-type]


def captions(path: object, **options: object) -> list[tuple[str, ...]]:
    """The captions of a source, whose images are all there."""
    found = read(path, **options)
    assert all(record.image and not record.fault for record in found)
    return [record.captions for record in found]


def write_parquet(path: Path, rows: list[str], names: list[str] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"image": [picture(i) for i in range(len(rows))], "caption": rows, "label": [0] * len(rows)})
    if names:
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path)


@holds("folder of images with .txt files")
def folder_with_texts(folder: Path) -> None:
    write_files(folder, IMAGES | {"a.txt": b"a\n", "b.TXT": b"b"})
    assert captions(folder) == CAPTIONS


@holds("folder with a sub-folder for each class")
def folder_of_classes(folder: Path) -> None:
    write_files(folder, {"top/cat/1.jpg": picture(1), "top/dog/1.jpg": picture(2)})
    for path in (folder, folder / "top"):
        assert [record.label for record in read(path)] == ["cat", "dog"]


@holds("folder of images alone")
def folder_alone(folder: Path) -> None:
    assert [(r.captions, r.label) for r in read(write_files(folder, IMAGES))] == [((), None)] * 2


@holds("folder of images with metadata.csv, .jsonl or .parquet")
def metadata(folder: Path) -> None:
    write_files(folder / "csv", IMAGES | {"metadata.csv": b"file_name,caption\na.jpg,a\n"})
    write_files(folder / "jsonl", IMAGES | {"metadata.jsonl": b'{"file_name": "a.jpg", "text": "a"}\n'})
    write_files(folder / "parquet", IMAGES)
    pq.write_table(pa.table({"file_name": ["a.jpg"], "caption": ["a"]}), folder / "parquet" / "metadata.parquet")
    for kind in ("csv", "jsonl", "parquet"):
        assert captions(folder / kind) == [("a",)]
        assert open_source(folder / kind).rejected == {f"image that metadata.{kind} does not name": 1}


@holds("folder of several splits")
def splits(folder: Path) -> None:
    write_files(folder, {f"{split}/cat/{i}.jpg": picture(i) for i, split in enumerate(("train", "val", "test"))})
    with pytest.raises(UserError, match="several splits: train, val, test; choose one, as in --split train"):
        open_source(folder)
    assert len(read(folder, split="train")) == 1 and len(read(folder, split="train+val")) == 2


@holds("glob or list of image files")
def several_files(folder: Path) -> None:
    write_files(folder, IMAGES | {"a.txt": b"a", "b.txt": b"b"})
    assert captions(f"{folder}/*") == CAPTIONS
    assert captions([folder / "a.jpg", folder / "b.jpg"]) == [(), ()]


@holds("CSV")
def csv(folder: Path) -> None:
    for mark in ",;":
        write_files(folder, IMAGES | {"pairs.csv": f"image{mark}caption\na.jpg{mark}a\nb.jpg{mark}b\n".encode()})
        assert captions(folder / "pairs.csv") == CAPTIONS


@holds("TSV")
def tsv(folder: Path) -> None:
    write_files(folder, IMAGES | {"pairs.tsv": b"image\tcaption\na.jpg\ta\nb.jpg\tb\n"})
    assert captions(folder / "pairs.tsv") == CAPTIONS


@holds("TSV or CSV with images in base64")
def tsv_base64(folder: Path) -> None:
    rows = "".join(f"{base64.urlsafe_b64encode(picture(i)).decode()}\t{name}\n" for i, name in enumerate("ab"))
    (folder / "pairs.tsv").write_text(f"image\tcaption\n{rows}")
    assert captions(folder / "pairs.tsv") == CAPTIONS


@holds("JSON lines")
def json_lines(folder: Path) -> None:
    rows = "".join(json.dumps({"image": f"{name}.jpg", "caption": name}) + "\n" for name in "ab")
    write_files(folder, IMAGES | {"pairs.jsonl": rows.encode()})
    assert captions(folder / "pairs.jsonl") == CAPTIONS


@holds("Parquet")
def parquet(folder: Path) -> None:
    write_parquet(folder / "x.parquet", ["a", "b"])
    assert captions(folder / "x.parquet") == captions(folder) == CAPTIONS


@holds("table of URLs")
def urls(folder: Path) -> None:
    (folder / "pairs.csv").write_text("url,caption\nhttps://example.org/a.jpg,a\n")
    assert [record.fault for record in read(folder / "pairs.csv")] == [
        "URL, not a file (download the images with img2dataset)"
    ]


@holds("Hugging Face repository on disk")
def repository(folder: Path) -> None:
    write_files(folder, {"README.md": b"---\n", ".gitattributes": b"", "dataset_infos.json": b"{}"})
    for split in ("train", "test"):
        write_parquet(folder / "data" / f"{split}-00000-of-00001.parquet", [split, "b"], ["cat", "dog"])
    with pytest.raises(UserError, match="several splits: train, test"):
        open_source(folder)
    assert captions(folder, split="test") == [("test",), ("b",)]
    assert {record.label for record in read(folder, split="test")} == {"cat"}


@holds("folder written by save_to_disk")
def saved_to_disk(folder: Path) -> None:
    import datasets

    one = datasets.Dataset.from_dict({"image": [picture(1), picture(2)], "caption": ["a", "b"]})
    one.save_to_disk(str(folder / "one"))
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(str(folder / "two"))
    assert captions(folder / "one") == captions(folder / "two", split="test") == CAPTIONS
    with pytest.raises(UserError, match="several splits: train, test"):
        open_source(folder / "two")


@holds("COCO's captions JSON")
def coco(folder: Path) -> None:
    notes = [{"image_id": i, "caption": text} for i, text in ((1, "a"), (0, "b"), (1, "more"))]
    value = {"images": [{"id": 1, "file_name": "a.jpg"}, {"id": 0, "file_name": "b.jpg"}], "annotations": notes}
    write_files(folder, {f"val2014/{name}": data for name, data in IMAGES.items()})
    write_files(folder, {"annotations/captions_val2014.json": json.dumps(value).encode()})
    file = folder / "annotations" / "captions_val2014.json"
    assert captions(file) == captions(file, images=str(folder / "val2014")) == [("a", "more"), ("b",)]


@holds("Karpathy's split JSON")
def karpathy(folder: Path) -> None:
    splits = {"a": "train", "b": "val"}
    images = [{"filename": f"{a}.jpg", "split": split, "sentences": [{"raw": a}]} for a, split in splits.items()]
    write_files(folder, IMAGES | {"dataset_flickr30k.json": json.dumps({"images": images}).encode()})
    with pytest.raises(UserError, match="several splits: train, val"):
        open_source(folder / "dataset_flickr30k.json")
    assert captions(folder / "dataset_flickr30k.json", split="val") == [("b",)]


@holds("other JSON")
def other_json(folder: Path) -> None:
    write_files(folder, {"x.json": b'{"rows": []}'})
    with pytest.raises(UserError, match="an unknown layout; of .json files COCO's captions .* and Karpathy's splits"):
        open_source(folder / "x.json")


@holds("folder of .tar shards")
def shards(folder: Path) -> None:
    for name in "ab":
        write_tar(folder / f"{name}.tar", [(f"{name}.jpg", IMAGES[f"{name}.jpg"]), (f"{name}.txt", name.encode())])
    assert captions(folder) == captions(f"{folder}/*.tar") == CAPTIONS


@holds("tar of img2dataset")
def img2dataset(folder: Path) -> None:
    for run, name in enumerate("ab"):
        info = json.dumps({"caption": name, "url": "u", "key": "000000000", "status": "success"}).encode()
        files = [("000000000.jpg", picture(run)), ("000000000.json", info)]
        write_tar(folder / f"run{run}-00000.tar", files + ([("000000000.txt", name.encode())] if run else []))
    assert captions(folder) == CAPTIONS
    assert len({record.key for record in read(folder)}) == 2


@holds("compressed tar")
def compressed(folder: Path) -> None:
    write_files(folder, {"00000.tar.gz": b"\x1f\x8b"})
    with pytest.raises(UserError, match="a compressed tar; .* unpack first: gunzip"):
        open_source(folder)


@pytest.mark.parametrize("row", ROWS)
def test_the_row_gives_what_the_table_says(row: str, tmp_path: Path) -> None:
    checks[row](tmp_path)


def test_every_check_has_its_row() -> None:
    assert len(ROWS) >= 20 and [*checks] == ROWS

"""Sets of several splits are read one split at a time; folders that only look like splits are classes."""

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from contrastive.cli import main
from contrastive.errors import UserError
from contrastive.shards import open_index, open_source

from .small import picture, write_files, write_tar


def write_parquet(path: Path, captions: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": picture(i), "path": None} for i in range(len(captions))]
    pq.write_table(pa.table({"image": images, "caption": captions}), path)


HUB = [
    ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "validation-00000-of-00001.parquet"],
    ["data/train-00000-of-00001-8cf2a.parquet", "data/test-00000-of-00001-8cf2b.parquet"],
    ["default/train/0000.parquet", "default/test/0000.parquet", "default/validation/0000.parquet"],
    ["train.parquet", "test.parquet"],
    ["flickr_train.parquet", "flickr_val.parquet", "flickr_test.parquet"],
    ["Train/part-0.parquet", "Valid/part-0.parquet"],
]


@pytest.mark.parametrize("names", HUB)
def test_a_folder_of_several_splits_asks_for_one(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        write_parquet(tmp_path / name, [name])
    write_files(tmp_path, {"README.md": b"# set", "dataset_infos.json": b"{}", ".gitattributes": b""})
    with pytest.raises(
        UserError, match=r"holds several splits: [Tt]rain.*; choose one, as in --split [Tt]rain"
    ) as error:
        open_source(tmp_path)
    assert "\n" not in str(error.value)
    found = [record.captions[0] for record in open_source(tmp_path, split="train")]
    assert found == [name for name in names if "train" in name.lower()]
    others = [name for name in names if "train" not in name.lower()]
    words = "+".join({"test" if "test" in name else "validation" for name in others})
    assert sorted(record.captions[0] for record in open_source(tmp_path, split=words)) == sorted(others)


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_text_tables_of_several_splits_ask_for_one(tmp_path: Path, kind: str) -> None:
    write_files(tmp_path, {"pictures/a.jpg": picture(1)})
    for split in ("train", "test"):
        mark = "\t" if kind == "tsv" else ","
        text = f"image{mark}caption\n../pictures/a.jpg{mark}{split}\n"
        if kind == "jsonl":
            text = f'{{"image": "../pictures/a.jpg", "caption": "{split}"}}\n'
        write_files(tmp_path / "tables", {f"{split}.{kind}": text.encode()})
    with pytest.raises(UserError, match="several splits: train, test"):
        open_source(tmp_path / "tables")
    (record,) = open_source(tmp_path / "tables", split="test")
    assert record.captions == ("test",) and record.image == picture(1)


@pytest.mark.parametrize("splits", [("train", "val"), ("training", "testing"), ("train", "valid", "test")])
@pytest.mark.parametrize("above", ["", "images/"])
def test_split_folders_with_class_folders_ask_for_one(tmp_path: Path, splits: tuple[str, ...], above: str) -> None:
    files = {
        f"{above}{split}/{label}/{i}.png": picture(i) for split in splits for i, label in enumerate(("cat", "dog"))
    }
    write_files(tmp_path, files | {"README.md": b"x"})
    with pytest.raises(UserError, match=f"several splits: {splits[0]}"):
        open_source(tmp_path)
    one = open_source(tmp_path, split=splits[1])
    assert [record.label for record in one] == ["cat", "dog"]
    both = open_source(tmp_path, split="+".join(splits))
    assert {record.label for record in both} == {"cat", "dog"} and len(both) == 2 * len(splits)


def test_splits_below_classes_ask_for_one(tmp_path: Path) -> None:
    names = [f"{label}/{split}/1.png" for label in ("cat", "dog") for split in ("train", "test")]
    write_files(tmp_path, {name: picture(i) for i, name in enumerate(names)})
    with pytest.raises(UserError, match="several splits: train, test"):
        open_source(tmp_path)
    found = {record.key: record.label for record in open_source(tmp_path, split="test")}
    assert found == {"cat/test/1.png": "cat", "dog/test/1.png": "dog"}


@pytest.mark.parametrize("names", [("car", "train", "bus"), ("train",), ("train", "tram"), ("test", "rest", "train")])
def test_classes_that_are_called_like_a_split_are_classes(tmp_path: Path, names: tuple[str, ...]) -> None:
    write_files(tmp_path, {f"{name}/1.png": picture(i) for i, name in enumerate(names)})
    assert [record.label for record in open_source(tmp_path)] == sorted(names)


def test_pictures_that_are_called_like_a_split_are_no_splits(tmp_path: Path) -> None:
    write_files(tmp_path, {"train-001.jpg": picture(1), "test-001.jpg": picture(2)})
    assert len(open_source(tmp_path)) == 2


@pytest.mark.parametrize(
    "names", [("train/0.tar", "val/0.tar"), ("train-0.tar", "test-0.tar"), ("x/train/0.tar", "x/test/0.tar")]
)
def test_shards_of_several_splits_ask_for_one(tmp_path: Path, names: tuple[str, ...]) -> None:
    for i, name in enumerate(names):
        write_tar(tmp_path / name, [("a.jpg", picture(i)), ("a.txt", name.encode())])
    with pytest.raises(UserError, match="several splits: train, "):
        open_source(tmp_path)
    assert [record.captions for record in open_source(tmp_path, split="train")] == [(names[0],)]


def test_shards_in_several_folders_that_are_no_splits_are_named(tmp_path: Path) -> None:
    for name in ("a/0.tar", "b/0.tar"):
        write_tar(tmp_path / name, [("a.jpg", picture(1)), ("a.txt", b"x")])
    with pytest.raises(UserError, match=r"\.tar shards lie in several folders \(a, b\); give one: .*/a$"):
        open_source(tmp_path)


def test_tables_of_several_configurations_are_named(tmp_path: Path) -> None:
    for name in ("de/0000.parquet", "en/0000.parquet"):
        write_parquet(tmp_path / name, [name])
    with pytest.raises(UserError, match=r"tables lie in several folders \(de, en\); give one"):
        open_source(tmp_path)


def test_tables_of_several_kinds_are_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["a"])
    write_files(tmp_path, {"b.csv": b"image,caption\n"})
    with pytest.raises(UserError, match=r"tables of several kinds \(csv, parquet\); give one by name"):
        open_source(tmp_path)


@pytest.mark.parametrize("split", ["train", "dev", "train+test"])
def test_a_split_that_is_not_there_is_an_error(tmp_path: Path, split: str) -> None:
    write_files(tmp_path / "plain", {"cat/1.png": picture(1), "dog/1.png": picture(1)})
    with pytest.raises(UserError, match=f"--split {split.replace('+', '.')}: .*plain holds no splits; leave it out"):
        open_source(tmp_path / "plain", split=split)
    write_files(tmp_path / "other", {"eval/cat/1.png": picture(1), "restval/cat/1.png": picture(1)})
    if split != "dev":
        with pytest.raises(UserError, match=f"--split {split.replace('+', '.')}: .* holds eval, restval"):
            open_source(tmp_path / "other", split=split)


@pytest.mark.parametrize("seed", range(3))
def test_generated_hub_folders_give_each_split_alone(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    counts = {split: draw.randint(1, 3) for split in ("train", "validation", "test")}
    for split, count in counts.items():
        for i in range(count):
            write_parquet(tmp_path / "data" / f"{split}-{i:05d}-of-{count:05d}.parquet", [f"{split} {i}"])
    for split, count in counts.items():
        found = [record.captions[0] for record in open_source(tmp_path, split=split)]
        assert found == [f"{split} {i}" for i in range(count)]


def test_the_shard_command_takes_one_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in HUB[0]:
        write_parquet(tmp_path / "hub" / name, [name, f"{name} again"])
    assert main(["shard", str(tmp_path / "hub"), str(tmp_path / "out")]) == 2
    assert "holds several splits: train, validation; choose one, as in --split train" in capsys.readouterr().err
    assert main(["shard", str(tmp_path / "hub"), str(tmp_path / "out"), "--split", "validation"]) == 0
    assert "2 pairs in 1 shard" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["parquet", "csv", "tar"])
def test_a_glob_over_several_splits_asks_for_one(tmp_path: Path, kind: str) -> None:
    write_files(tmp_path, {"train.jpg": picture(1), "val.jpg": picture(2)})
    for name in ("train", "val"):
        if kind == "parquet":
            write_parquet(tmp_path / f"{name}-00000-of-00001.parquet", [name])
        elif kind == "csv":
            write_files(tmp_path, {f"{name}.csv": f"image,caption\n{name}.jpg,{name}\n".encode()})
        else:
            write_tar(tmp_path / f"{name}-0.tar", [("a.jpg", picture(1)), ("a.txt", name.encode())])
    glob = f"{tmp_path}/*.{kind}"
    with pytest.raises(UserError, match=r"several splits: train, val.*--split train, or give a narrower glob$"):
        open_source(glob)
    assert [record.captions for record in open_source(glob, split="val")] == [("val",)]
    assert len(open_source(f"{tmp_path}/train*.{kind}")) == 1
    assert len(open_source(sorted(tmp_path.glob(f"*.{kind}")))) == 2
    if kind == "tar":
        with pytest.raises(UserError, match="shards of several splits: train, validation; give a narrower glob"):
            open_index(glob)


@pytest.mark.parametrize("name", ["{}/train-00000.{}", "{}/train/0.{}"])
@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_a_split_of_several_configurations_is_refused_by_name(tmp_path: Path, name: str, kind: str) -> None:
    for folder in ("en", "de"):
        for path in (
            tmp_path / name.format(folder, kind),
            tmp_path / name.replace("train", "test").format(folder, kind),
        ):
            if kind == "parquet":
                write_parquet(path, [folder])
            else:
                write_tar(path, [("a.jpg", picture(1)), ("a.txt", folder.encode())])
    with pytest.raises(UserError, match=r"the split train lies in several folders \(de, en\).*give one: .*/de$"):
        open_source(tmp_path, split="train")
    assert [record.captions for record in open_source(tmp_path / "de", split="train")] == [("de",)]


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_a_missing_part_of_a_set_is_named(tmp_path: Path, kind: str) -> None:
    for part in (0, 2):
        path = tmp_path / f"train-{part:05d}-of-00003.{kind}"
        if kind == "parquet":
            write_parquet(path, ["x"])
        else:
            write_tar(path, [(f"{part}.jpg", picture(part)), (f"{part}.txt", b"x")])
    for path in (tmp_path, f"{tmp_path}/*.{kind}"):
        for opened in (open_source, open_index) if kind == "tar" else (open_source,):
            with pytest.raises(UserError, match=rf"train-00001-of-00003\.{kind}: this file of 00003 is missing"):
                opened(path)
    assert len(open_source(f"{tmp_path}/train-00000*.{kind}")) == 1


def test_a_missing_arrow_file_is_named(tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"image": [picture(i) for i in range(3)], "caption": ["a", "b", "c"]})
    rows.save_to_disk(str(tmp_path / "d"), num_shards=3)
    (tmp_path / "d" / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(UserError, match=r"data-00001-of-00003\.arrow: is missing"):
        open_source(tmp_path / "d")


def test_the_folder_of_a_split_is_no_class_without_images(tmp_path: Path) -> None:
    names = [f"{split}/{label}/0.png" for split in ("train", "test") for label in ("cat", "dog")]
    write_files(tmp_path, {name: picture(i) for i, name in enumerate(names)})
    assert open_source(tmp_path, split="train").notes == []

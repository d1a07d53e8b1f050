"""Tar shards: what pairs with what, and what is counted."""

import json
import random
from pathlib import Path

import pytest

from contrastive.errors import UserError
from contrastive.shards import ShardIndex, open_index, open_source

from .small import DATA, picture, write_tar


def opened(name: str, tmp_path: Path) -> ShardIndex:
    """The shards of a case, copied, as an index is saved beside them."""
    for shard in (DATA / name).glob("*.tar"):
        (tmp_path / shard.name).write_bytes(shard.read_bytes())
    return open_index(tmp_path)


def pairs(index: ShardIndex) -> dict[str, str]:
    return {index.key(i): index.caption(i) for i in range(len(index))}


@pytest.mark.parametrize(("name", "count"), [("tar_dotted_keys", 12), ("tar_all_dotted", 6)])
def test_keys_with_dots_are_pairs(tmp_path: Path, name: str, count: int) -> None:
    index = opened(name, tmp_path)
    assert len(index) == count and index.rejected == {}


@pytest.mark.parametrize("seed", range(3))
def test_generated_keys_with_dots_are_pairs(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    keys = {
        ".".join(draw.choice(["img", "v2", "2024", "x y"]) + str(i) for _ in range(draw.randint(2, 4)))
        for i in range(9)
    }
    files = [(f"{key}.{draw.choice(['jpg', 'JPG', 'jpeg'])}", picture(i)) for i, key in enumerate(sorted(keys))]
    files += [(f"{key}.txt", key.encode()) for key in keys]
    draw.shuffle(files)
    index = open_index(write_tar(tmp_path / "x.tar", files))
    assert pairs(index) == {key: key for key in keys}


def test_members_after_the_first_dot_belong_to_the_sample_as_in_webdataset(tmp_path: Path) -> None:
    files = [
        ("a.jpg", picture(1)),
        ("a.txt", b"a"),
        ("a.seg.png", picture(2, "PNG")),
        ("a.meta.json", b"{}"),
        ("a.v.txt", b""),
    ]
    index = open_index(write_tar(tmp_path / "x.tar", files))
    assert pairs(index) == {"a": "a"} and index.rejected == {}
    assert index.manifest["ignored"] == {"meta.json": 1, "seg.png": 1, "v.txt": 1}


def test_a_pair_that_may_belong_to_another_is_counted(tmp_path: Path) -> None:
    files = [("a.jpg", picture(1)), ("a.txt", b"a"), ("a.1.jpg", picture(2)), ("a.1.txt", b"b")]
    index = open_index(write_tar(tmp_path / "x.tar", files))
    assert pairs(index) == {"a": "a"}
    assert index.rejected == {"pair that may belong to another, by its first dot": 1}


@pytest.mark.parametrize(
    ("lonely", "reason"), [(("c.1.jpg", picture(3)), "no caption"), (("c.1.txt", b"x"), "no image")]
)
def test_half_a_pair_whose_key_has_a_dot_is_counted(tmp_path: Path, lonely: tuple[str, bytes], reason: str) -> None:
    index = open_index(write_tar(tmp_path / "x.tar", [("a.jpg", picture(1)), ("a.txt", b"a"), lonely]))
    assert index.rejected == {reason: 1}


def test_captions_in_json_are_read(tmp_path: Path) -> None:
    index = opened("tar_captions_in_json", tmp_path)
    assert len(index) == 6 and all(pairs(index).values())
    record = index.record(0)
    assert record.captions == (index.caption(0),) and record.captions[0] not in record.meta.values()


@pytest.mark.parametrize(
    ("info", "captions"),
    [
        ({"caption": " a cat "}, ("a cat",)),
        ({"captions": ["one", "", "two", "one"]}, ("one", "two")),
        ({"text": "t", "status": "success", "key": "0"}, ("t",)),
        ({"caption": None, "title": "title"}, ("title",)),
        ({"caption": ["x", 3, "y"]}, ("x", "y")),
    ],
)
def test_the_usual_names_of_captions_are_looked_for_in_json(tmp_path: Path, info: object, captions: tuple[str]) -> None:
    files = [("a.jpg", picture(1)), ("a.json", json.dumps(info).encode())]
    index = open_index(write_tar(tmp_path / "x.tar", files))
    assert (index.caption(0), index.variants(0)) == (captions[0], captions[1:])
    assert index.pair(0) == (picture(1), captions[0]) and index.record(0).captions == captions


def test_the_text_file_goes_before_the_json(tmp_path: Path) -> None:
    files = [
        ("a.jpg", picture(1)),
        ("a.txt", b"text"),
        ("a.json", b'{"caption": "json", "captions": ["text", "more"]}'),
    ]
    index = open_index(write_tar(tmp_path / "x.tar", files))
    assert index.record(0).captions == ("text", "more")


@pytest.mark.parametrize(
    ("info", "reason"),
    [
        (b'{"url": "x"}', "no caption"),
        (b'{"caption": ""}', "no caption"),
        (b'["caption"]', "no caption"),
        (b'{"caption": "\\ud800"}', "caption not UTF-8"),
        (b"caption", "not JSON"),
        (json.dumps({"caption": "x" * 70_000}).encode(), "text too long"),
    ],
)
def test_json_without_a_caption_is_counted(tmp_path: Path, info: bytes, reason: str) -> None:
    files = [("a.jpg", picture(1)), ("a.json", info), ("b.jpg", picture(2)), ("b.txt", b"b")]
    index = open_index(write_tar(tmp_path / "x.tar", files))
    assert pairs(index) == {"b": "b"} and index.rejected == {reason: 1}


def test_upper_case_names_are_pairs_in_a_tar_as_in_a_folder(tmp_path: Path) -> None:
    files = [("A.JPG", picture(1)), ("A.TXT", b"a"), ("IMG_2.JPG", picture(2)), ("img_2.txt", b"b")]
    assert pairs(open_index(write_tar(tmp_path / "x.tar", files))) == {"A": "a", "IMG_2": "b"}


def test_hidden_members_are_counted_and_are_no_bad_pairs(tmp_path: Path) -> None:
    files = [("a.jpg", picture(1)), ("a.txt", b"a"), ("._a.jpg", b"x"), ("__MACOSX/a.jpg", b"x"), (".git/b.txt", b"x")]
    index = open_index(write_tar(tmp_path / "x.tar", files))
    assert pairs(index) == {"a": "a"} and index.rejected == {}
    (reason,) = open_source(tmp_path / "x.tar").rejected.items()
    assert reason[0].startswith("hidden (") and reason[1] == 3


@pytest.mark.parametrize("above", ["./", "././", "./d/./", "d/./e/"])
def test_names_that_begin_with_the_folder_itself_are_pairs(tmp_path: Path, above: str) -> None:
    files = [(f"{above}00.png", picture(1, "PNG")), (f"{above}00.txt", b"a"), ("./x.1.jpg", picture(2))]
    index = open_index(write_tar(tmp_path / "x.tar", [*files, ("./x.1.txt", b"b"), ("./.hid/a.png", b"x")]))
    folder = "".join(f"{part}/" for part in above.split("/") if part.isalpha())
    assert pairs(index) == {f"{folder}00": "a", "x.1": "b"} and index.rejected == {}


def test_a_tar_of_hidden_members_says_so(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [(".hid/a.png", picture(1)), (".hid/a.txt", b"a")])
    with pytest.raises(UserError, match=r"no pair in 1 shard.*also members hidden \(begins with a dot"):
        open_index(tmp_path / "x.tar")


def test_equal_keys_of_two_runs_of_img2dataset_are_all_kept(tmp_path: Path) -> None:
    index = opened("img2dataset_two_runs_same_keys", tmp_path)
    assert len(index) == 16 and len(pairs(index)) == 16
    assert len(set(index.image_ids.tolist())) == 16
    assert index.notes == ["8 keys occur in several shards with other content: the shard's name was put before them"]


@pytest.mark.parametrize("runs", [2, 3])
def test_equal_keys_are_kept_where_shards_of_several_folders_have_one_name(tmp_path: Path, runs: int) -> None:
    for run in range(runs):
        files = [
            (f"{i:03d}.{kind}", data) for i in range(3) for kind, data in (("jpg", picture(9 * run + i)), ("txt", b"x"))
        ]
        write_tar(tmp_path / f"run{run}" / "00000.tar", files)
    index = open_index(f"{tmp_path}/*/00000.tar")
    assert len(pairs(index)) == 3 * runs and index.rejected == {}


def test_a_pair_that_occurs_in_two_shards_is_kept_once_and_counted(tmp_path: Path) -> None:
    for name in "ab":
        write_tar(tmp_path / f"{name}.tar", [("x.jpg", picture(1)), ("x.txt", b"x")])
    index = open_index(tmp_path)
    assert pairs(index) == {"x": "x"} and index.rejected == {"duplicate key": 1} and index.notes == []


def test_shards_of_several_splits_in_one_folder_are_not_mixed(tmp_path: Path) -> None:
    for i, name in enumerate(("train-00000", "train-00001", "val-00000")):
        write_tar(tmp_path / f"{name}.tar", [(f"{i}.jpg", picture(i)), (f"{i}.txt", b"x")])
    with pytest.raises(
        UserError, match=r"splits: train, validation; give a glob of one, such as '.*/train-0000\*\.tar'"
    ):
        open_index(tmp_path)
    with pytest.raises(UserError, match="several splits: train, validation; choose one, as in --split train"):
        open_source(tmp_path)
    assert len(open_source(tmp_path, split="train")) == len(open_index(f"{tmp_path}/train-0000*.tar")) == 2
    assert len(open_source(tmp_path, split="train+val")) == 3

import hashlib
import io
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from contrastive.errors import UserError
from contrastive.shards import Record, ShardIndex, open_index, write_shards
from contrastive.shards.index import VERSION

from .conftest import encoded, records

Shards = Callable[..., ShardIndex]


def write_tar(path: Path, files: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def test_records_come_back_as_written(shards: Shards) -> None:
    items = [Record("x", encoded(), ("a", "b"), "cat", {"source": "s"}), *records(6)]
    index = shards(items)
    assert [index.record(i) for i in range(len(index))] == items
    assert list(index.captions()) == [item.captions[0] for item in items]
    assert index.variants(0) == ("b",)


def test_ids_are_equal_where_captions_differ_in_case_and_space_only(shards: Shards) -> None:
    captions = ("Red  Apple", "red apple", "red apples", "ﬁre", "fire")
    index = shards([Record(str(i), encoded(i), (caption,)) for i, caption in enumerate(captions)])
    assert index.ids.dtype == np.int64
    assert index.ids[0] == index.ids[1] != index.ids[2]
    assert index.ids[3] == index.ids[4]


def test_image_ids_are_equal_where_the_files_are_equal_byte_for_byte(shards: Shards) -> None:
    one, other = encoded(1), encoded(2)
    padded = [one + bytes(4000) + bytes([last]) + bytes(4000) for last in (0, 1)]  # differ in the middle only
    images = [one, other, one, *padded, other, padded[1]]
    index = shards([Record(str(i), image, (f"caption {i}",)) for i, image in enumerate(images)])
    assert index.image_ids.dtype == np.int64
    found = index.image_ids.tolist()
    assert [[a == b for b in found] for a in found] == [[a == b for b in images] for a in images]
    assert index.repeated_images == 3
    copy = pickle.loads(pickle.dumps(index))
    assert copy.image_ids.tolist() == found and copy.repeated_images == 3


def test_the_index_is_saved_and_read_back(shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = shards(records(6))
    assert (tmp_path / "shards" / "index.tables").exists()
    monkeypatch.setattr("contrastive.shards.index.scan_shard", lambda shard: pytest.fail("scanned again"))
    again = open_index(tmp_path / "shards")
    assert again.fingerprint == index.fingerprint
    assert again.record(5) == index.record(5)


def test_a_changed_shard_is_indexed_again(shards: Shards, tmp_path: Path) -> None:
    before = shards(records(6))
    write_tar(tmp_path / "shards" / "00001.tar", [("new.png", encoded()), ("new.txt", b"new")])
    after = open_index(tmp_path / "shards")
    assert [after.key(i) for i in range(len(after))][4:] == ["new"]
    assert after.fingerprint != before.fingerprint


@pytest.mark.parametrize("name", ["index.tables", "index.json"])
@pytest.mark.parametrize("left", [0, 5, 60, 500, -1])
def test_a_damaged_saved_index_is_built_again(name: str, left: int, shards: Shards, tmp_path: Path) -> None:
    index = shards(records(3))
    path = tmp_path / "shards" / name
    path.write_bytes(path.read_bytes()[:left])
    assert open_index(tmp_path / "shards").fingerprint == index.fingerprint


def test_a_folder_that_cannot_be_written_is_indexed_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(records(3), tmp_path / "a")

    def refuse(*arguments: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr("contrastive.shards.tables_file.os.replace", refuse)
    assert len(open_index(tmp_path / "a")) == 3
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["00000.tar", "manifest.json"]


def test_the_fingerprint_does_not_depend_on_place_or_time(shards: Shards, tmp_path: Path) -> None:
    index = shards(records(6), "a")
    other = shards(records(6), "b")
    os.utime(other.shards[0], (1, 1))
    assert open_index(tmp_path / "b").fingerprint == index.fingerprint
    assert shards(records(5), "c").fingerprint != index.fingerprint


def test_samples_with_a_missing_half_are_counted(tmp_path: Path) -> None:
    files = [
        ("a.png", encoded()),
        ("a.txt", b"caption"),
        ("b.png", encoded()),
        ("c.txt", b"no image"),
        ("d.png", encoded()),
        ("d.txt", b" \n"),
        ("e.png", encoded()),
        ("e.txt", b"\xff\xfe\xff"),
        ("f.json", b"{}"),
    ]
    write_tar(tmp_path / "x.tar", files)
    index = open_index(tmp_path)
    assert [index.key(i) for i in range(len(index))] == ["a"]
    assert index.rejected == {"caption not UTF-8": 1, "empty caption": 1, "no caption": 1, "no image": 2}


def test_shards_without_captions_are_an_error(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [("a.png", encoded()), ("b.png", encoded())])
    with pytest.raises(UserError, match="no pair in 1 shards .2 with no caption"):
        open_index(tmp_path)


def test_two_images_of_one_key_are_left_out_and_counted(tmp_path: Path) -> None:
    files = [("a.png", encoded(1)), ("a.jpg", encoded(2)), ("a.txt", b"which?"), ("b.png", encoded(3)), ("b.txt", b"b")]
    write_tar(tmp_path / "x.tar", files)
    index = open_index(tmp_path)
    assert [index.key(i) for i in range(len(index))] == ["b"]
    assert index.rejected == {"caption of several images": 1}


def test_of_two_members_of_one_name_the_first_stays_and_the_second_is_counted(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [("a.png", encoded(1)), ("a.png", encoded(2)), ("a.txt", b"which?")])
    index = open_index(tmp_path)
    assert index.image(0) == encoded(1)
    assert index.rejected == {"duplicate key": 1}


def test_a_damaged_shard_is_an_error(shards: Shards, tmp_path: Path) -> None:
    shard = shards(records(6)).shards[1]
    shard.write_bytes(shard.read_bytes()[:700])
    with pytest.raises(UserError, match=r"00001\.tar: the file is cut off.*at byte"):
        open_index(tmp_path / "shards")


@pytest.mark.parametrize("name", ["absent", "empty", "x.tar.gz"])
def test_what_is_no_shard_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.tar.gz").touch()
    with pytest.raises(UserError, match=name):
        open_index(tmp_path / name)


def test_one_tar_a_glob_and_a_list_are_opened(shards: Shards, tmp_path: Path) -> None:
    index = shards(records(10))
    assert len(open_index(index.shards[0])) == 4
    assert len(open_index(f"{tmp_path}/shards/0000[01].tar")) == 8
    assert len(open_index(index.shards[1:])) == 6
    assert len(open_index(tmp_path / "shards")) == 10


def test_an_index_travels_to_another_process(shards: Shards) -> None:
    index = shards(records(6))
    index.image(0)  # has a file open now
    assert pickle.loads(pickle.dumps(index)).record(5) == index.record(5)


def test_key_hashes_are_those_of_the_keys_alone(shards: Shards) -> None:
    index = shards(records(6))
    expected = [hashlib.blake2b(index.key(i).encode(), digest_size=8).digest() for i in range(len(index))]
    assert index.key_hashes.dtype == np.uint64
    assert index.key_hashes.astype("<u8").tobytes() == b"".join(expected)


def test_an_index_of_another_version_is_built_again(shards: Shards, tmp_path: Path) -> None:
    index = shards(records(3))
    saved = tmp_path / "shards" / "index.json"
    current = f'"version": {VERSION}'
    saved.write_text(saved.read_text().replace(current, f'"version": {VERSION - 1}'))
    assert open_index(tmp_path / "shards").fingerprint == index.fingerprint
    assert current in saved.read_text()

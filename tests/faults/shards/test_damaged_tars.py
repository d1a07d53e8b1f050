"""Damaged shards: named with the place of the damage, where Python's tarfile loses what follows without a word."""

import os
import shutil
import tarfile
from pathlib import Path

import pytest

from contrastive.errors import UserError
from contrastive.shards import open_index

from .tars import header_of, pairs, write_tar


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return write_tar(tmp_path / "s" / "00000.tar", pairs(10))


def test_cut_off_in_the_data_of_a_member(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[: header_of(shard, "p0005.png") + 520])
    with pytest.raises(UserError, match=r"00000\.tar: the file is cut off: a member of .* does not fit, at byte"):
        open_index(shard.parent)


def test_cut_off_in_a_header(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[: header_of(shard, "p0005.png") + 100])
    with pytest.raises(UserError, match="no end-of-archive mark"):
        open_index(shard.parent)


def test_cut_off_between_two_members(shard: Path) -> None:
    at = header_of(shard, "p0005.png")
    shard.write_bytes(shard.read_bytes()[:at])
    with tarfile.open(shard) as tar:
        assert len(tar.getnames()) == 10  # of 20, without an error
    with pytest.raises(UserError, match=f"no end-of-archive mark, at byte {at}"):
        open_index(shard.parent)


@pytest.mark.parametrize("what", ["random", "zeros"])
def test_an_overwritten_header_where_tarfile_loses_half_the_shard_silently(shard: Path, what: str) -> None:
    data, at = bytearray(shard.read_bytes()), header_of(shard, "p0005.png")
    data[at : at + 512] = bytes(512) if what == "zeros" else bytes((i * 37 + 11) % 256 for i in range(512))
    shard.write_bytes(data)
    with tarfile.open(shard) as tar:
        assert len(tar.getnames()) == 10
    with pytest.raises(UserError, match=f"at byte {at}"):
        open_index(shard.parent)


def test_two_tars_joined_by_cat(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes() * 2)
    with pytest.raises(UserError, match="data after the end-of-archive mark"):
        open_index(shard.parent)


def test_all_damaged_shards_are_named_at_once(shard: Path) -> None:
    for number in range(1, 8):
        shutil.copy(shard, shard.with_name(f"{number:05d}.tar"))
    for number in range(1, 8):
        other = shard.with_name(f"{number:05d}.tar")
        other.write_bytes(other.read_bytes()[:5000])
    with pytest.raises(
        UserError, match=r"7 of 8 shards .* 00001\.tar: .*; 00005\.tar: .* and 2 more; .*--skip-damaged"
    ):
        open_index(shard.parent)


def test_damaged_shards_are_left_out_as_a_whole_when_asked_and_training_does_too(shard: Path) -> None:
    bad = write_tar(shard.with_name("00001.tar"), pairs(10, first=10))
    bad.write_bytes(bad.read_bytes()[:3000])
    index = open_index(shard.parent, skip_damaged=True)
    assert [index.key(i) for i in range(len(index))] == [f"p{i:04d}" for i in range(10)]
    again = open_index(shard.parent)
    assert len(again) == 10
    assert list(again.manifest["damaged"]) == ["00001.tar"]


@pytest.mark.parametrize("count", [1, 7, 1000])
def test_shards_of_any_number_of_pairs(tmp_path: Path, count: int) -> None:
    write_tar(tmp_path / "x.tar", pairs(count))
    assert len(open_index(tmp_path)) == count


def test_a_flipped_bit_of_an_image_is_found_by_a_full_check_only(shard: Path) -> None:
    index = open_index(shard.parent)
    before = shard.stat()
    data = bytearray(shard.read_bytes())
    data[header_of(shard, "p0003.png") + 520] ^= 4
    shard.write_bytes(data)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a disk would do it
    assert len(open_index(shard.parent)) == 10
    with pytest.raises(UserError, match=r"00000\.tar: not the bytes that were indexed"):
        index.verify()

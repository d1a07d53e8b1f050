import io
import random
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contrastive.errors import UserError
from contrastive.shards.tar import members

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def write(path: Path, files: dict[str, bytes], format: int = tarfile.GNU_FORMAT) -> None:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def read(path: Path) -> dict[str, bytes]:
    data = path.read_bytes()
    return {member.name: data[member.offset : member.offset + member.size] for member in members(path)}


@pytest.mark.parametrize("format", FORMATS)
def test_members_are_those_of_pythons_tarfile(tmp_path: Path, format: str) -> None:
    files = {"a.txt": b"", "sub/b.png": bytes(512), "c.json": bytes(range(256)) * 5}
    if format != "ustar":
        files |= {"n" * 150 + ".txt": b"long", "ü/" + "ß" * 120 + ".txt": b"long and not ASCII"}
    write(tmp_path / "x.tar", files, FORMATS[format])
    assert read(tmp_path / "x.tar") == files


def test_folders_are_passed_over(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        folder = tarfile.TarInfo("sub")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        tar.addfile(tarfile.TarInfo("sub/real.txt"))
    assert list(read(tmp_path / "x.tar")) == ["sub/real.txt"]


def test_a_damaged_header_is_an_error_with_its_offset(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    write(path, {f"{i}.txt": b"text" for i in range(4)})
    data = bytearray(path.read_bytes())
    data[2048 + 30] ^= 1  # each member takes 1,024 bytes: this is the third header
    path.write_bytes(data)
    with tarfile.open(path) as tar, pytest.raises(UserError, match=r"x\.tar: damaged header .*at byte 2048"):
        assert len(tar.getnames()) == 2  # what the strict reader is for: half a shard, and no error
        read(path)


@settings(max_examples=60, deadline=None)
@given(share=st.floats(0, 1), seed=st.integers(0, 99))
def test_a_tar_cut_anywhere_is_an_error(tmp_path_factory: pytest.TempPathFactory, share: float, seed: int) -> None:
    path = tmp_path_factory.mktemp("cut") / "x.tar"
    write(path, {f"{i}.txt": random.Random(seed + i).randbytes(700) for i in range(3)})
    data = path.read_bytes()
    end = 3 * (512 + 1024) + 1024  # what is after the two zero blocks is padding
    path.write_bytes(data[: int(share * (end - 1))])
    with pytest.raises(UserError, match=r"x\.tar: .*at byte \d+"):
        read(path)


@settings(max_examples=60, deadline=None)
@given(place=st.integers(0, 511), bit=st.integers(0, 7))
def test_any_flipped_bit_of_a_header_is_noticed(tmp_path_factory: pytest.TempPathFactory, place: int, bit: int) -> None:
    path = tmp_path_factory.mktemp("flip") / "x.tar"
    write(path, {"a.txt": b"first", "b.txt": b"second"})
    data = bytearray(path.read_bytes())
    data[1024 + place] ^= 1 << bit
    path.write_bytes(data)
    try:
        found = read(path)
    except UserError:
        return
    assert found == {"a.txt": b"first", "b.txt": b"second"}  # padding around the checksum means nothing


def test_data_after_the_end_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "x.tar", {"a.txt": b"first"})
    (tmp_path / "x.tar").write_bytes((tmp_path / "x.tar").read_bytes() * 2)
    with pytest.raises(UserError, match="data after the end-of-archive mark"):
        read(tmp_path / "x.tar")


def test_an_empty_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.tar").touch()
    with pytest.raises(UserError, match="empty"):
        read(tmp_path / "x.tar")

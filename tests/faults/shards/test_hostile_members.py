"""Members that have no place in a shard: the shard is refused by name, and nothing of it is opened, run or unpacked."""

import bz2
import gzip
import lzma
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pytest

from contrastive.errors import UserError
from contrastive.shards import open_index

from .tars import image, pairs, write_tar


def member(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    found = tarfile.TarInfo(name)
    found.type, found.linkname = kind, link
    return found


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (tarfile.SYMTYPE, "a symbolic link"),
        (tarfile.LNKTYPE, "a hard link"),
        (tarfile.FIFOTYPE, "a named pipe"),
        (tarfile.CHRTYPE, "a device"),
        (tarfile.BLKTYPE, "a device"),
        (tarfile.GNUTYPE_SPARSE, "a sparse file"),
    ],
)
def test_anything_but_files_and_folders_is_refused(tmp_path: Path, kind: bytes, told: str) -> None:
    write_tar(tmp_path / "x.tar", pairs(2), member("a.png", kind, "/etc/passwd"))
    with pytest.raises(UserError, match=rf"x\.tar: {told} instead of a file"):
        open_index(tmp_path)


def test_a_sparse_file_in_a_pax_header_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        sparse = tarfile.TarInfo("a.png")
        sparse.pax_headers = {"GNU.sparse.realsize": "1000000000000"}
        tar.addfile(sparse)
    with pytest.raises(UserError, match="a sparse file"):
        open_index(tmp_path)


@pytest.mark.parametrize("name", ["/etc/a.png", "../a.png", "a/../../b.png", "a/..", "line\nbreak.png", "bell\a.txt"])
def test_names_that_lead_out_or_cannot_be_printed_are_refused(tmp_path: Path, name: str) -> None:
    write_tar(tmp_path / "x.tar", [*pairs(2), (name, image())])
    with pytest.raises(UserError, match="leads out of a folder or cannot be printed"):
        open_index(tmp_path)


@pytest.mark.parametrize(
    ("compress", "told"),
    [(gzip.compress, "gzip"), (bz2.compress, "bzip2"), (lzma.compress, "xz")],
    ids=["gzip", "bzip2", "xz"],
)
def test_compression_under_the_name_of_a_tar_is_named(tmp_path: Path, compress: Any, told: str) -> None:
    path = write_tar(tmp_path / "x.tar", pairs(2))
    path.write_bytes(compress(path.read_bytes()))
    with pytest.raises(UserError, match=f"compressed with {told}.*unpack it"):
        open_index(tmp_path)


class Canary:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["CANARY"],)


@pytest.mark.parametrize("extension", ["pyd", "pkl", "pickle", "pth", "pt", "so", "py", "cls.pkl", "PKL"])
def test_a_pickle_canary_never_runs_and_fails_the_index(
    tmp_path: Path, extension: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CANARY", str(tmp_path / "it ran"))
    write_tar(tmp_path / "x.tar", [*pairs(2), (f"p0000.{extension}", pickle.dumps(Canary()))])
    with pytest.raises(UserError, match=rf"'p0000\.{extension}' is code or a pickle"):
        open_index(tmp_path)
    assert not (tmp_path / "it ran").exists()
    pickle.loads(pickle.dumps(Canary()))  # the canary is alive
    assert (tmp_path / "it ran").exists()


def test_harmless_members_of_other_kinds_are_counted_and_not_opened(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [*pairs(2), ("p0000.cls", b"3"), ("p0001.npy", b"\x93NUMPY"), ("README", b"hello")])
    index = open_index(tmp_path)
    assert len(index) == 2
    assert index.manifest["ignored"] == {"": 1, "cls": 1, "npy": 1}


@pytest.mark.parametrize("size", [b"-0000007777", b"+0000000012", b"0_000_00012", b"00000000x12"])
def test_a_size_that_int_would_take_and_tar_has_not_is_damage(tmp_path: Path, size: bytes) -> None:
    path = write_tar(tmp_path / "x.tar", pairs(2))
    data = bytearray(path.read_bytes())
    data[124:135] = size
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])  # a good checksum: only the size is wrong
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"damaged header \(size\), at byte 0"):
        open_index(tmp_path)


def test_a_name_as_long_as_a_book_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("n" * 100_000 + ".png"))
    with pytest.raises(UserError, match="a name or pax header of 100005 bytes"):
        open_index(tmp_path)

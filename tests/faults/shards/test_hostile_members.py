"""Members that have no place in a shard: the shard is refused by name, and nothing of it is opened, run or unpacked."""

import bz2
import gzip
import lzma
import os
import pickle
import subprocess
import sys
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from contrastive.errors import UserError
from contrastive.shards import Rejected, open_index, scan
from contrastive.shards import tar as tar_module
from contrastive.shards.tables_file import save_tables
from tests.distributed.spawn import PATIENCE

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


@pytest.mark.parametrize(
    "extension", ["pyd", "pkl", "pickle", "pth", "pt", "so", "py", "cls.pkl", "PKL", "pkl.gz", "pth.xz.gz"]
)
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


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
def test_a_name_longer_than_a_path_can_be_is_refused(tmp_path: Path, format: int) -> None:
    with tarfile.open(tmp_path / "x.tar", "w", format=format) as tar:
        tar.addfile(tarfile.TarInfo("n" * 4093 + ".png"))
    with pytest.raises(UserError, match="a name of 4,097 characters"):
        open_index(tmp_path)


@pytest.mark.parametrize("cap", ["MAX_MEMBERS", "MAX_NAMES"])
def test_more_members_than_memory_is_meant_for_are_refused(
    tmp_path: Path, cap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tar(tmp_path / "x.tar", pairs(10))  # 20 members, with names of 9 characters
    monkeypatch.setattr(scan, cap, 20 if cap == "MAX_MEMBERS" else 180)
    assert len(open_index(tmp_path)) == 10
    write_tar(tmp_path / "x.tar", pairs(11))
    with pytest.raises(UserError, match="make smaller shards"):
        open_index(tmp_path)


def test_a_member_takes_no_more_than_1500_bytes_of_memory_whatever_it_is(tmp_path: Path) -> None:
    header, count = bytearray(tarfile.TarInfo("0" * 12 + ".txt").tobuf(tarfile.USTAR_FORMAT)), 10_000
    with open(tmp_path / "x.tar", "wb") as file:
        for i in range(count):  # headers alone: of all bytes, those that ask for most memory
            header[:12] = b"%012d" % i
            header[148:156] = b" " * 8
            header[148:156] = b"%06o\0 " % sum(header)
            file.write(header)
        file.write(bytes(1024))
    tracemalloc.start()
    with pytest.raises(UserError, match=f"{count} with no image"):
        open_index(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak / count < 1500


def test_kinds_of_ignored_members_are_not_listed_without_end(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [*pairs(1), *((f"a.{i}", b"") for i in range(500))])
    ignored = open_index(tmp_path).manifest["ignored"]
    assert (len(ignored), sum(ignored.values()), ignored["others"]) == (51, 500, 450)


def test_a_named_pipe_called_a_tar_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.tar")
    code = f"from contrastive.shards import open_index; open_index({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert "x.tar: not a regular file" in done.stderr


def test_a_folder_called_a_tar_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.tar").mkdir()
    with pytest.raises(UserError, match=r"x\.tar: not a regular file"):
        open_index(str(tmp_path / "*.tar"))


def test_a_pax_header_with_thousands_of_fields_costs_no_more_than_its_bytes(tmp_path: Path) -> None:
    body = b"5 a=\n" * 13_000
    with open(tmp_path / "x.tar", "wb") as file:
        for _ in range(20):
            header = tarfile.TarInfo("pax")
            header.type, header.size = tarfile.XHDTYPE, len(body)
            file.write(header.tobuf(tarfile.USTAR_FORMAT) + body + bytes(-len(body) % 512))
            file.write(tarfile.TarInfo("a.cls").tobuf(tarfile.USTAR_FORMAT))
        file.write(bytes(1024))
    copied = 0

    class Counted(bytes):
        """Counts what its slices copy."""

        def __getitem__(self, where: Any) -> Any:
            nonlocal copied
            part = bytes.__getitem__(self, where)
            copied += len(part) if isinstance(part, bytes) else 1
            return part

        def rstrip(self, *what: Any) -> "Counted":
            return Counted(bytes.rstrip(self, *what))

    pread = os.pread
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tar_module.os, "pread", lambda *where: Counted(pread(*where)))
        assert len(list(tar_module.members(tmp_path / "x.tar"))) == 20
    assert copied < 5 * (tmp_path / "x.tar").stat().st_size


def test_a_saved_index_that_claims_a_terabyte_is_not_believed(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", pairs(2))
    index = open_index(tmp_path)
    tables = {name: array.copy() for name, array in index._tables.items()}
    tables["sizes"][0, 0] = 1 << 40
    tables["offsets"][1, 0] = 1 << 62
    save_tables(tmp_path / "index.tables", index.fingerprint, tables)
    hostile = open_index(tmp_path)
    for i in range(2):
        with pytest.raises(Rejected, match="shard changed since indexing"):
            hostile.image(i)

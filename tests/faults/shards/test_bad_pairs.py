"""Pairs that cannot be used: left out, counted and listed in the manifest with their reason; the good ones stay."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contrastive.shards import Rejected, open_index, scan

from .tars import image, pairs, write_tar

HTML = b"<!doctype html><html><body>404 Not Found</body></html>"


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ([("a.png", image())], "no caption"),
        ([("a.txt", b"text")], "no image"),
        ([("a.json", b"{}")], "no image"),
        ([("a.png", image()), ("a.txt", b"")], "empty caption"),
        ([("a.png", image()), ("a.txt", b" \n\t")], "empty caption"),
        ([("a.png", image()), ("a.txt", b"caf\xe9")], "caption not UTF-8"),
        ([("a.png", image()), ("a.txt", b"x" * 10_000_000)], "text too long"),
        ([("a.jpg", HTML), ("a.txt", b"text")], "not an image"),
        ([("a.png", b""), ("a.txt", b"text")], "not an image"),
        ([("a.png", image()), ("a.txt", b"text"), ("a.json", b"{")], "not JSON"),
        ([("a.png", image()), ("a.txt", b"text"), ("a.json", b"[" * 5000 + b"]" * 5000)], "JSON too deep"),
        ([("a.png", image()), ("a.txt", b"text"), ("a.json", b'{"a":' * 40 + b"1" + b"}" * 40)], "JSON too deep"),
    ],
)
def test_a_bad_pair_is_left_out_with_its_reason(tmp_path: Path, files: list[tuple[str, bytes]], reason: str) -> None:
    write_tar(tmp_path / "x.tar", [*files, *pairs(2)])
    index = open_index(tmp_path)
    assert [index.key(i) for i in range(len(index))] == ["p0000", "p0001"]
    assert index.rejected == {reason: 1}
    assert index.manifest["rejected"] == [{"shard": "x.tar", "key": "a", "reason": reason}]


def test_an_image_above_the_cap_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "MAX_IMAGE_BYTES", 1000)
    write_tar(tmp_path / "x.tar", [("a.png", image() + bytes(1001)), ("a.txt", b"text"), *pairs(1)])
    assert open_index(tmp_path).rejected == {"image too large": 1}


def test_a_caption_of_ten_megabytes_is_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(tmp_path / "x.tar", [("a.png", image()), ("a.txt", b"x" * 10_000_000), *pairs(1)])
    sizes, pread = [], scan.os.pread
    monkeypatch.setattr(scan.os, "pread", lambda file, n, at: (sizes.append(n), pread(file, n, at))[1])
    open_index(tmp_path)
    assert 0 < max(sizes) <= 1 << 20  # the size of a look behind the end of the archive


def test_brackets_inside_a_string_are_no_depth(tmp_path: Path) -> None:
    meta = json.dumps({"note": "[" * 500}).encode()
    write_tar(tmp_path / "x.tar", [("a.png", image()), ("a.txt", b"text"), ("a.json", meta)])
    assert open_index(tmp_path).record(0).meta == {"note": "[" * 500}


def test_of_a_key_in_two_shards_the_first_stays(tmp_path: Path) -> None:
    first = write_tar(tmp_path / "0.tar", pairs(3))
    shutil.copy(first, tmp_path / "1.tar")
    write_tar(tmp_path / "2.tar", pairs(2, first=2))
    index = open_index(tmp_path)
    assert [index.key(i) for i in range(len(index))] == ["p0000", "p0001", "p0002", "p0003"]
    assert index.rejected == {"duplicate key": 4}
    assert index.shard_starts.tolist() == [0, 3, 3, 4]


@settings(max_examples=40, deadline=None)
@given(order=st.permutations(range(18)), count=st.integers(1, 6))
def test_the_halves_of_a_pair_may_lie_anywhere_in_their_shard(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], count: int
) -> None:
    files = [*pairs(count), *((f"p{i:04d}.json", json.dumps({"label": str(i)}).encode()) for i in range(count))]
    path = write_tar(tmp_path_factory.mktemp("any") / "x.tar", [files[i] for i in order if i < len(files)])
    index = open_index(path)
    found = {index.key(i): index.record(i) for i in range(len(index))}
    assert sorted(found) == [f"p{i:04d}" for i in range(count)]
    for i, record in enumerate(found[key] for key in sorted(found)):
        assert (record.image, record.captions, record.label) == (image(i), (f"caption {i}",), str(i))


def test_a_shard_that_is_deleted_during_the_run_is_unavailable(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", pairs(3))
    index = open_index(tmp_path)
    path.unlink()
    with pytest.raises(Rejected, match="shard unavailable"):
        index.image(0)


@pytest.mark.parametrize("open_before", [True, False])
def test_a_shard_that_changes_during_the_run_is_noticed_at_the_next_read(tmp_path: Path, open_before: bool) -> None:
    path = write_tar(tmp_path / "x.tar", pairs(3))
    index = open_index(tmp_path)
    if open_before:
        assert index.image(0) == image(0)
    data = bytearray(path.read_bytes())
    random.Random(0).shuffle(data)
    path.write_bytes(data)
    with pytest.raises(Rejected, match="shard changed since indexing"):
        index.image(0)
    with pytest.raises(Rejected, match="shard changed since indexing"):
        index.caption(1)


def test_a_shard_that_becomes_shorter_is_noticed(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", pairs(3))
    index = open_index(tmp_path)
    index.image(0)
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(Rejected, match="shard changed since indexing"):
        index.image(2)


def test_the_tables_are_mapped_not_read(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", pairs(50))
    open_index(tmp_path)
    ids = open_index(tmp_path).ids
    while isinstance(ids, np.ndarray) and not isinstance(ids, np.memmap):
        ids = ids.base
    assert isinstance(ids, np.memmap)


def test_variants_that_no_tokenizer_can_take_are_passed_over(tmp_path: Path) -> None:
    captions = [b'"half a pair \\ud800"', b'"' + b"x" * 70_000 + b'"', b'"good"']
    meta = b'{"captions": [' + b", ".join(captions) + b"]}"
    write_tar(tmp_path / "x.tar", [("a.png", image()), ("a.txt", b"text"), ("a.json", meta)])
    assert open_index(tmp_path).variants(0) == ("good",)

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from contrastive.errors import UserError
from contrastive.shards import Record, open_index, open_source, write_shards

from .conftest import VAL, encoded, records


def tars(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name.startswith(("0", "m"))}


def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    source = open_source(VAL, limit=30)
    write_shards(source, tmp_path / "a", samples_per_shard=8)
    write_shards(source, tmp_path / "b" / "c", samples_per_shard=8)
    assert len(tars(tmp_path / "a")) == 5  # four shards and the manifest
    assert tars(tmp_path / "a") == tars(tmp_path / "b" / "c")


def test_pythons_tarfile_finds_the_bytes_of_the_parquet_file(tmp_path: Path) -> None:
    write_shards(open_source(VAL, limit=12), tmp_path / "a")
    with tarfile.open(tmp_path / "a" / "00000.tar") as tar:
        for row in pq.read_table(VAL).slice(0, 12).to_pylist():
            image, text, info = (tar.extractfile(f"{row['key']}.{kind}") for kind in ("webp", "txt", "json"))
            assert image and image.read() == row["image"]
            assert text and text.read().decode() == row["caption"]
            meta = json.loads(info.read()) if info else {}
            assert sorted(meta["captions"]) == sorted(row["captions"])
            assert (meta["source"], meta["license"]) == (row["source"], row["license"])


def test_webdataset_reads_the_shards(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    write_shards(open_source(VAL, limit=12), tmp_path / "a", samples_per_shard=5)
    urls = [str(path) for path in sorted((tmp_path / "a").glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))  # no decoding
    rows = pq.read_table(VAL).slice(0, 12).to_pylist()
    assert [(s["__key__"], s["webp"], s["txt"].decode()) for s in samples] == [
        (row["key"], row["image"], row["caption"]) for row in rows
    ]


def test_the_extension_is_the_real_formats(tmp_path: Path) -> None:
    kinds = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tiff"}
    write_shards([Record(kind, encoded(format=kind), ("a",)) for kind in kinds], tmp_path / "a")
    with tarfile.open(tmp_path / "a" / "00000.tar") as tar:
        images = [name for name in tar.getnames() if not name.endswith((".txt", ".json"))]
    assert images == [f"{kind}.{extension}" for kind, extension in kinds.items()]


def test_what_is_no_pair_is_counted_by_reason(tmp_path: Path) -> None:
    good, other = records(2)
    bad = [
        Record("a", None, ("no image",)),
        Record("b", b"<html>404</html>", ("no image either",)),
        Record("c", encoded()),
        Record("d", encoded(), ("  ",)),
    ]
    manifest = write_shards([good, *bad, replace(other, captions=("Caption  0",))], tmp_path / "a")
    assert manifest.skipped == {"no caption": 2, "no image": 1, "unknown image format": 1}
    assert (manifest.pairs, manifest.duplicate_captions) == (2, 1)
    assert json.loads((tmp_path / "a" / "manifest.json").read_text())["pairs"] == 2


def test_no_pair_at_all_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="all 3 rows have no caption"):
        write_shards([replace(record, captions=()) for record in records(3)], tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_repeated_key_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="key 'sample-000' occurs twice"):
        write_shards(records(2) + records(1), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_keys_with_dots_and_folders_keep_their_samples_together(tmp_path: Path) -> None:
    good = records(1)[0]
    write_shards([replace(good, key=key) for key in ("a.b/c.v1", "a.b/c.v2", "/../d")], tmp_path / "a")
    assert [open_index(tmp_path / "a").key(i) for i in range(3)] == ["a_b/c_v1", "a_b/c_v2", "__/d"]


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.tex").touch()
    with pytest.raises(UserError, match="not empty"):
        write_shards(records(1), tmp_path / "a")
    with pytest.raises(UserError, match="thesis.tex"):
        write_shards(records(1), tmp_path / "a", overwrite=True)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["thesis.tex"]


def test_overwrite_replaces_all_old_shards(tmp_path: Path) -> None:
    write_shards(records(6), tmp_path / "a", samples_per_shard=2)
    open_index(tmp_path / "a")
    write_shards(records(2), tmp_path / "a", overwrite=True)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["00000.tar", "manifest.json"]


def test_shards_can_be_written_over_the_shards_they_come_from(tmp_path: Path) -> None:
    write_shards(records(6), tmp_path / "a", samples_per_shard=2)
    write_shards(open_source(tmp_path / "a"), tmp_path / "a", samples_per_shard=3, overwrite=True)
    assert [open_index(tmp_path / "a").record(i) for i in range(6)] == records(6)

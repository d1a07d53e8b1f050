import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contrastive.errors import UserError
from contrastive.shards import make_shards, on_processes, open_index, open_source
from contrastive.shards.keys import changed_key, file_prefixes, key_changes, plain_id, safe_key, text_id

from .conftest import encoded

KEYS = st.text("ab._/é", min_size=1, max_size=3)
ROWS = st.lists(st.tuples(KEYS, st.integers(0, 2)), max_size=30)


def changes_of(rows: list[tuple[str, int]]) -> tuple[np.ndarray, tuple[int, int] | None]:
    safe, plain = [text_id(safe_key(key)) for key, _ in rows], [plain_id(key) for key, _ in rows]
    arrays = (np.array(values, np.int64) for values in (safe, plain, [file for _, file in rows]))
    return key_changes(*arrays)


def test_keys_whose_hashes_are_the_same_by_chance_stay_as_they_are() -> None:
    keys = ["a", "b"]
    safe, plain = np.zeros(2, np.int64), np.array([plain_id(key) for key in keys])
    changes, clash = key_changes(safe, plain, np.zeros(2, np.int64))
    assert clash is None and not changes.any()


@settings(deadline=None, max_examples=200)
@given(ROWS)
def test_keys_are_unique_or_two_rows_of_one_file_have_the_same(rows: list[tuple[str, int]]) -> None:
    changes, clash = changes_of(rows)
    if clash:
        first, second = clash
        assert first < second and rows[first] == rows[second]
        assert rows.index(rows[second]) == first  # and no row before is repeated earlier
    else:
        assert len(set(rows)) == len(rows)
        changed = [changed_key(key, int(change), f"f{file}") for (key, file), change in zip(rows, changes, strict=True)]
        assert len(set(changed)) == len(rows)


@settings(deadline=None, max_examples=100)
@given(ROWS)
def test_only_keys_that_repeat_change(rows: list[tuple[str, int]]) -> None:
    changes, _ = changes_of(list(dict.fromkeys(rows)))
    safe = [safe_key(key) for key, _ in dict.fromkeys(rows)]
    for name, change in zip(safe, changes, strict=True):
        assert not change or safe.count(name) > 1


@pytest.mark.parametrize("key", ["a\ud800b", "a\x7fb", "../a", "/a", "a\nb", "a.b.c", ".", "", "a\\b"])
def test_a_safe_key_is_read_back_from_a_tar(tmp_path: Path, key: str) -> None:
    from contrastive.shards import Record, write_shards

    write_shards([Record(key, encoded(), ("a",))], tmp_path / "a")
    assert open_index(tmp_path / "a").key(0) == safe_key(key)


def test_a_prefix_has_as_many_folders_as_are_needed() -> None:
    files = ["/d/a/x.csv", "/d/b/x.csv", "/d/b/y.csv", "/e/a/x.csv", "/e/z.tar.gz"]
    assert file_prefixes([Path(file) for file in files]) == ["d/a/x", "b/x", "y", "e/a/x", "z"]
    assert len(set(file_prefixes([Path("/d/a.csv"), Path("/d/a.tsv")]))) == 2


def table(path: Path, keys: list[str], first: int = 0) -> None:
    path.parent.mkdir(exist_ok=True)
    images = [encoded(first + i) for i in range(len(keys))]
    captions = [f"caption {first + i}" for i in range(len(keys))]
    pq.write_table(pa.table({"key": keys, "image": images, "caption": captions}), path)


def made(source: Path | str, dest: Path, **options: Any) -> tuple[dict[str, str], list[str]]:
    """Keys and captions of the shards that are made, and the notes."""
    manifest = make_shards(open_source(source), dest, samples_per_shard=2, **options)
    index = open_index(dest)
    return {index.key(i): index.caption(i) for i in range(len(index))}, manifest.notes


def test_a_key_of_two_files_gets_the_files_name_before_it(tmp_path: Path) -> None:
    table(tmp_path / "t" / "a.parquet", ["x", "y", "z"])
    table(tmp_path / "t" / "b.parquet", ["y", "z", "w"], 3)
    found, notes = made(tmp_path / "t", tmp_path / "out")
    assert list(found) == ["x", "a/y", "a/z", "b/y", "b/z", "w"]
    assert list(found.values()) == [f"caption {i}" for i in range(6)]
    assert notes == ["4 keys occur in several files: the file's name was put before them, as in a/y"]


def test_keys_that_differ_in_characters_a_shard_cannot_hold_stay_apart(tmp_path: Path) -> None:
    table(tmp_path / "t" / "a.parquet", ["a.b", "a_b", "c", "a\\b"])
    found, notes = made(tmp_path / "t", tmp_path / "out")
    marked = [f"a_b-{text_id(key) % 2**32:08x}" for key in ("a.b", "a\\b")]
    assert list(found) == [marked[0], "a_b", "c", marked[1]]
    assert notes == [
        f"2 keys differ only in characters that a shard's key cannot hold: a hash was put after them, as in {marked[0]}"
    ]


def test_changed_keys_do_not_depend_on_processes_or_interruptions(tmp_path: Path) -> None:
    for number, name in enumerate("abc"):
        table(tmp_path / "t" / f"{name}.parquet", [f"{i}.{i % 3}" for i in range(5)], 5 * number)
    made(tmp_path / "t", tmp_path / "one")
    made(tmp_path / "t", tmp_path / "two", runner=on_processes(2))

    def dies(function: Any, job: Any, tasks: Any, what: str) -> Any:
        for task in tasks:
            if "unique" in what and task.part.number == 3:
                raise KeyboardInterrupt
            yield function(job, task)

    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "t", tmp_path / "three", runner=dies)
    made(tmp_path / "t", tmp_path / "three")
    folders = [tmp_path / name for name in ("one", "two", "three")]
    contents = [{p.name: p.read_bytes() for p in folder.iterdir() if p.suffix == ".tar"} for folder in folders]
    assert len(contents[0]) == 8 and contents[0] == contents[1] == contents[2]
    assert len(open_index(tmp_path / "one")) == 15


@pytest.mark.parametrize("size", [1, 10])
def test_a_key_that_occurs_twice_in_one_file_names_both_rows_and_a_remedy(tmp_path: Path, size: int) -> None:
    table(tmp_path / "t" / "a.parquet", ["x", "y", "z", "y"])
    message = r"key 'y' occurs twice: .*row 2.* and .*row 4.*; give every pair a key of its own, or drop .*column 'key'"
    with pytest.raises(UserError, match=message):
        make_shards(open_source(tmp_path / "t"), tmp_path / "out", samples_per_shard=size)
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


def test_a_changed_key_that_another_row_has_is_an_error(tmp_path: Path) -> None:
    table(tmp_path / "t" / "a.parquet", ["x", "b/x"])
    table(tmp_path / "t" / "b.parquet", ["x"], 2)
    with pytest.raises(UserError, match="keys 'b/x' and 'x' are the same in a shard: .*give every pair a key"):
        make_shards(open_source(tmp_path / "t"), tmp_path / "out")


def test_pythons_tarfile_reads_the_changed_keys(tmp_path: Path) -> None:
    table(tmp_path / "t" / "a.parquet", ["x"])
    table(tmp_path / "t" / "b.parquet", ["x"], 1)
    make_shards(open_source(tmp_path / "t"), tmp_path / "out")
    with tarfile.open(tmp_path / "out" / "00000.tar") as tar:
        assert [name for name in tar.getnames() if name.endswith(".txt")] == ["a/x.txt", "b/x.txt"]

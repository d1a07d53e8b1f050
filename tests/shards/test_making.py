import csv
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from contrastive.errors import UserError
from contrastive.shards import (
    Filters,
    Source,
    Transform,
    make_shards,
    on_processes,
    on_ray,
    open_index,
    open_source,
    write_shards,
)
from contrastive.shards.pools import run_here
from tests.distributed.spawn import PATIENCE

from .conftest import VAL, encoded, records


def contents(folder: Path) -> dict[str, bytes]:
    """The shards and the manifest."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".tar", ".json")}


def table(folder: Path, rows: int = 10, **columns: list[Any]) -> Source:
    images = [encoded(i) for i in range(rows)]
    columns = {"image": images, "caption": [f"caption {i}" for i in range(rows)], **columns}
    pq.write_table(pa.table(columns), folder / "x.parquet", row_group_size=4)
    return open_source(folder / "x.parquet")


def die_at_second_part(job: Any, task: Any) -> None:
    if task.part.number == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def refuse(job: Any, task: Any) -> None:
    raise UserError("the source must be mended")


def test_parts_make_the_shards_that_one_stream_makes(tmp_path: Path) -> None:
    source = open_source(VAL, limit=25)
    make_shards(source, tmp_path / "parts", samples_per_shard=8)
    write_shards(source, tmp_path / "stream", samples_per_shard=8)
    for shard in sorted((tmp_path / "stream").glob("*.tar")):
        assert (tmp_path / "parts" / shard.name).read_bytes() == shard.read_bytes()


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl", "images", "shards"])
@pytest.mark.parametrize("size", [1, 3, 100])
def test_the_parts_of_a_source_are_its_records_in_order(tmp_path: Path, kind: str, size: int) -> None:
    for i in range(7):
        (tmp_path / f"{i}.png").write_bytes(encoded(i))
        (tmp_path / f"{i}.txt").write_text(f"caption {i}")
    captions = [f'line\nbreak, "quoted" and\rold {i}' for i in range(7)]
    paths: dict[str, Any] = {"images": tmp_path, "shards": tmp_path / "shards"}
    write_shards(records(7), tmp_path / "shards", samples_per_shard=2)
    (tmp_path / "tables").mkdir()
    for name, rows in {"a": range(4), "b": range(4, 7)}.items():
        images = [str(tmp_path / f"{i}.png") for i in rows]
        texts = [captions[i] for i in rows]
        columns = {"image": images, "caption": texts}
        pq.write_table(pa.table(columns), tmp_path / "tables" / f"{name}.parquet", row_group_size=2)
        with open(tmp_path / "tables" / f"{name}.csv", "w", newline="", encoding="utf-8-sig") as file:
            csv.writer(file).writerows([["image", "caption"], *zip(images, texts, strict=True)])
        lines = [json.dumps({"image": image, "caption": text}) for image, text in zip(images, texts, strict=True)]
        (tmp_path / "tables" / f"{name}.jsonl").write_text("\n\n".join(lines), encoding="utf-8-sig")
    source = open_source(paths.get(kind, f"{tmp_path}/tables/*.{kind}"))
    parts = source.cut(size)
    assert [record for part in parts for record in source.read(part)] == list(source)
    assert [len(list(source.read(part))) for part in parts] == [size] * (7 // size) + [7 % size] * (7 % size > 0)
    if kind in ("csv", "jsonl", "parquet"):
        assert [record.captions[0] for record in source] == captions


def test_a_limit_holds_for_the_parts_too(tmp_path: Path) -> None:
    source = table(tmp_path)
    source.limit = 5
    assert [record.key for part in source.cut(2) for record in source.read(part)] == [f"{i:09d}" for i in range(5)]


def test_two_processes_write_the_bytes_of_one(tmp_path: Path) -> None:
    source = table(tmp_path, 30, caption=[f"caption {i % 11}" for i in range(30)])
    options: dict[str, Any] = {
        "samples_per_shard": 4,
        "filters": Filters(deduplicate="caption"),
        "transform": Transform(resize=10, format="jpeg"),
    }
    make_shards(source, tmp_path / "one", **options)
    made = make_shards(source, tmp_path / "two", **options, runner=on_processes(2))
    assert made.skipped == {"duplicate caption": 19}
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_what_repeats_in_a_later_part_is_left_out(tmp_path: Path) -> None:
    images = [encoded(i) for i in (0, 1, 0, 2, 1, 3)]
    captions = ["a", "b", "c", "A ", "d", "c"]
    source = table(tmp_path, 6, image=images, caption=captions)
    kept = {}
    for what in ("caption", "image", "both"):
        made = make_shards(source, tmp_path / what, samples_per_shard=2, filters=Filters(deduplicate=what))
        index = open_index(tmp_path / what)
        kept[what] = [int(index.key(i)) for i in range(len(index))], made.skipped
    assert kept == {
        "caption": ([0, 1, 2, 4], {"duplicate caption": 2}),
        "image": ([0, 1, 3, 5], {"duplicate image": 2}),
        # row 2 repeats an image: it does not hide the caption of row 5
        "both": ([0, 1, 5], {"duplicate caption": 1, "duplicate image": 2}),
    }


def test_every_row_is_a_pair_or_counted(tmp_path: Path) -> None:
    images = [b"<html>", encoded(1)[:60], encoded(2), None, encoded(4), encoded(5)]
    captions = ["a", "b", "", "d", "x" * (1 << 21), "f"]
    source = table(tmp_path, 6, image=images, caption=captions)
    made = make_shards(source, tmp_path / "out", samples_per_shard=2, transform=Transform(resize=8))
    assert made.skipped == {
        "no caption": 1,
        "no image": 1,
        "text too long": 1,
        "truncated or damaged": 1,
        "unknown image format": 1,
    }
    assert made.pairs == 1
    assert made.shards == ["00002.tar"]  # a part without a pair makes no shard


def test_a_key_that_repeats_in_another_part_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    source = table(tmp_path, 4, key=["a", "b", "c", "b"])
    with pytest.raises(UserError, match="key 'b' occurs twice"):
        make_shards(source, tmp_path / "out", samples_per_shard=2)
    assert [path.name for path in tmp_path.iterdir()] == ["x.parquet"]


def test_the_same_command_again_does_nothing(tmp_path: Path) -> None:
    first = make_shards(table(tmp_path), tmp_path / "out")
    before = (tmp_path / "out" / "00000.tar").stat()
    assert make_shards(open_source(tmp_path / "x.parquet"), tmp_path / "out") == first
    assert (tmp_path / "out" / "00000.tar").stat().st_ino == before.st_ino


def test_a_finished_folder_of_other_settings_is_refused(tmp_path: Path) -> None:
    source = table(tmp_path)
    make_shards(source, tmp_path / "out")
    with pytest.raises(UserError, match="finished shards of another source or other settings; give another folder"):
        make_shards(source, tmp_path / "out", filters=Filters(min_size=2))


def test_overwrite_makes_shards_over_the_shards_they_come_from(tmp_path: Path) -> None:
    write_shards(records(6), tmp_path / "a", samples_per_shard=2)
    make_shards(open_source(tmp_path / "a"), tmp_path / "a", samples_per_shard=3, overwrite=True)
    assert [open_index(tmp_path / "a").record(i) for i in range(6)] == records(6)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_killed_process_is_told_and_nothing_hangs(tmp_path: Path) -> None:
    tasks = _tasks(table(tmp_path))
    with pytest.raises(UserError, match="killed while making shards.*part [01] of 5.*fewer --workers"):
        list(on_processes(2)(die_at_second_part, None, tasks, "making shards"))


def test_a_mistake_found_by_a_process_reaches_the_user(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="^the source must be mended$"):
        list(on_processes(2)(refuse, None, _tasks(table(tmp_path)), "making shards"))
    assert not multiprocessing.active_children()


def _tasks(source: Source) -> list[Any]:
    from contrastive.shards.making import Task

    return [Task(part) for part in source.cut(2)]


def test_paths_that_leave_the_tables_folder_are_counted(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "in.png").write_bytes(encoded(0))
    (tmp_path / "out.png").write_bytes(encoded(1))
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "out.png")
    rows = ["in.png,a", "../out.png,b", f"{tmp_path}/out.png,c", "link.png,d", f"{tmp_path}/data/in.png,e"]
    (tmp_path / "data" / "x.csv").write_text("\n".join(["image,caption", *rows]))
    faults = [r.fault for r in open_source(tmp_path / "data" / "x.csv", allow_outside=False, group=False)]
    assert faults == [None, *["path outside the table's folder"] * 3, None]
    assert all(r.image and not r.fault for r in open_source(tmp_path / "data" / "x.csv", group=False))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Six rows as Hugging Face's `datasets` saves them, in two files."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
        }
    )
    rows = {
        "image": [{"bytes": encoded(i), "path": None} for i in range(6)],
        "text": [f"caption {i}" for i in range(6)],
        "label": [0, 1, 0, 1, 0, 1],
    }
    data = datasets.Dataset.from_dict(rows, features=features)
    data.save_to_disk(str(tmp_path / "saved"), num_shards=2)
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(str(tmp_path / "splits"))
    return tmp_path / "saved"


def test_a_saved_dataset_is_a_source(saved: Path) -> None:
    source = open_source(saved)
    found = list(source)
    assert (source.kind, len(source), len(source.files)) == ("datasets", 6, 2)
    assert [r.image for r in found] == [encoded(i) for i in range(6)]
    assert [r.captions for r in found] == [(f"caption {i}",) for i in range(6)]
    assert [r.label for r in found] == ["cat", "dog"] * 3
    assert [r for part in source.cut(4) for r in source.read(part)] == found


def test_a_folder_of_splits_names_them(saved: Path) -> None:
    with pytest.raises(UserError, match="several splits: train, test; choose one, as in --split train"):
        open_source(saved.parent / "splits")


def test_a_saved_dataset_names_no_file_elsewhere(saved: Path) -> None:
    (saved / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../x.arrow"}]}))
    with pytest.raises(UserError, match="names no data files in this folder"):
        open_source(saved)


def test_resized_images_are_what_was_asked_for(tmp_path: Path) -> None:
    source = table(tmp_path, 2, image=[encoded(0, (60, 40)), encoded(1, (20, 16))])
    make_shards(source, tmp_path / "out", transform=Transform(resize=30, mode="longer", format="webp"))
    index = open_index(tmp_path / "out")
    assert [_opened(index.image(i)) for i in range(2)] == [("WEBP", (30, 20)), ("WEBP", (20, 16))]


def _opened(data: bytes) -> tuple[str | None, tuple[int, int]]:
    import io

    image = Image.open(io.BytesIO(data))
    return image.format, image.size


def test_a_ray_cluster_of_two_nodes_writes_the_bytes_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))  # the nodes import what this process imports
    source = table(tmp_path, 30, caption=[f"caption {i % 13}" for i in range(30)])
    options: dict[str, Any] = {
        "samples_per_shard": 5,
        "filters": Filters(deduplicate="both"),
        "transform": Transform(resize=10),
    }
    node: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        cluster.add_node(**node)
        make_shards(source, tmp_path / "ray", **options, runner=on_ray(cluster.address))
        assert len([n for n in ray.nodes() if n["Alive"]]) == 2
        with pytest.raises(UserError, match="^the source must be mended$"):
            list(on_ray()(refuse, None, _tasks(source), ""))
    finally:
        ray.shutdown()
        cluster.shutdown()
    make_shards(source, tmp_path / "here", **options, runner=run_here)
    assert contents(tmp_path / "ray") == contents(tmp_path / "here")


def test_a_cluster_that_is_not_there_is_told(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    with pytest.raises(UserError, match="--ray 127.0.0.1:1: no cluster answers there"):
        list(on_ray("127.0.0.1:1")(refuse, None, _tasks(table(tmp_path)), ""))


def test_an_orphaned_process_ends_by_itself(tmp_path: Path) -> None:
    parent = multiprocessing.get_context("spawn").Process(target=_sleepers, args=(tmp_path,))
    parent.start()
    deadline = time.monotonic() + PATIENCE
    while len(list(tmp_path.glob("*.pid"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    pids = [int(path.stem) for path in tmp_path.glob("*.pid")]
    assert parent.pid and len(pids) == 2
    os.kill(parent.pid, signal.SIGKILL)
    parent.join()
    while any(_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(_alive(pid) for pid in pids)


def _sleepers(folder: Path) -> None:
    list(on_processes(2)(_sleep, folder, [1, 2], ""))


def _sleep(folder: Path, task: int) -> None:
    (folder / f"{os.getpid()}.pid").touch()
    time.sleep(600)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False

"""A store that fails: what it means for one shard, for an index and for training batches."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from contrastive.errors import UserError
from contrastive.shards import PairLoader, open_index, write_shards
from contrastive.shards import storage as storage_module
from contrastive.shards.record import Rejected
from contrastive.shards.storage import ShardUnavailable, configure, expand, local_path, shard_stat
from tests.distributed.spawn import PATIENCE, run_ranks
from tests.shards.conftest import lengths, records
from tests.tiny import write_corpus, write_recipe

from .server import Store, serve

# A busy machine may take seconds to start the process that downloads, which is no stall.
SETTINGS = {"stall_seconds": 60.0, "deadline_seconds": 200.0, "retries": 2, "first_wait_seconds": 0.05}
STALL_SECONDS = 5.0  # where a server does stall
VARIABLES = ("STALL", "DEADLINE", "RETRIES", "WAIT")
TAR = np.random.default_rng(0).bytes(300_000)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, impatient settings, and no memory of failures."""
    for name in (*(f"CONTRASTIVE_REMOTE_{name}" for name in VARIABLES), "CONTRASTIVE_CACHE_BYTES"):
        monkeypatch.setenv(name, "")  # so that it is put back
    monkeypatch.setenv("CONTRASTIVE_CACHE", str(tmp_path / "cache"))
    configure(**SETTINGS)
    monkeypatch.setattr(storage_module, "_failed", {})
    return tmp_path / "cache"


@pytest.fixture
def store() -> Iterator[Store]:
    with serve() as store:
        store.files["shards/a.tar"] = TAR
        yield store


def shards_of(store: Store, folder: Path, count: int = 8) -> str:
    """Put shards of four pairs into the store; the URL of their folder."""
    write_shards(records(count), folder, samples_per_shard=4)
    store.files = {f"shards/{path.name}": path.read_bytes() for path in folder.glob("*.tar")}
    return store.url("shards")


def loader(url: str | list[str], **options: object) -> PairLoader:
    place = {"tokenize": lengths, "image_size": 16, "augment": None, "global_batch": 4, "steps": 2, **options}
    return PairLoader(open_index(url), **place)  # type: ignore[arg-type]


def names(cache: Path) -> set[str]:
    """Kinds of files in the cache, beside locks."""
    return {path.suffix for path in (cache / "shards").iterdir()} - {".lock"}


@pytest.mark.parametrize("fault", ["500", "503", "429", "short", "unannounced", "stall", "moved"])
def test_a_passing_fault_is_outlived(store: Store, fault: str) -> None:
    store.faults["shards/a.tar"] = [fault]
    if fault == "stall":
        configure(stall_seconds=STALL_SECONDS)
    assert local_path(store.url("shards/a.tar")).read_bytes() == TAR
    assert len(store.gets) == 2  # with "moved", the second is for the other address


@pytest.mark.parametrize("fault", ["500", "short", "unannounced", "stall"])
def test_a_lasting_fault_is_told_after_three_attempts_and_leaves_nothing(store: Store, cache: Path, fault: str) -> None:
    store.always["shards/a.tar"] = fault
    if fault == "stall":
        configure(stall_seconds=STALL_SECONDS)
    with pytest.raises(ShardUnavailable, match=r"shards/a\.tar: .* \(attempts: 3, in .*; check that"):
        local_path(store.url("shards/a.tar"))
    # on a busy machine an attempt may be over before the server has seen it
    assert len([get for get in store.gets if get == "shards/a.tar"]) >= 2
    assert names(cache) == set()


def test_an_unavailable_shard_is_not_asked_for_again_by_each_of_its_samples(store: Store) -> None:
    store.always["shards/a.tar"] = "500"
    for _ in range(3):
        with pytest.raises(Rejected) as caught:
            local_path(store.url("shards/a.tar"))
        assert caught.value.reason == "shard unavailable"
        asked = len(store.gets)
        store.always.clear()
    assert len(store.gets) == asked


@pytest.mark.parametrize(("status", "said"), [("404", "(HTTP 404|no such file)"), ("403", "HTTP 403")])
def test_what_is_not_there_or_forbidden_is_asked_for_once(store: Store, status: str, said: str) -> None:
    store.always["shards/a.tar"] = status
    with pytest.raises(ShardUnavailable, match=rf"a\.tar: {said} \(attempts: 1, "):
        local_path(store.url("shards/a.tar"))
    assert len(store.gets) <= 2  # a HEAD that is refused makes the driver try a GET


def test_the_deadline_bounds_attempts_that_do_not_stall(store: Store) -> None:
    configure(deadline_seconds=1.5, retries=1000)
    store.always["shards/a.tar"] = "503"
    with pytest.raises(ShardUnavailable):  # of 1,000 attempts, few
        local_path(store.url("shards/a.tar"))
    assert len(store.gets) < 1000


def test_a_server_that_is_not_there_is_told() -> None:
    with pytest.raises(ShardUnavailable, match="x.tar: ConnectionRefusedError"):
        local_path("http://127.0.0.1:1/x.tar")


def test_credentials_are_in_no_message_and_no_file(store: Store, cache: Path) -> None:
    store.always["shards/a.tar"] = "404"
    with pytest.raises(ShardUnavailable) as caught:
        local_path(store.url("shards/a.tar?X-Amz-Signature=hunter2", user="me:hunter3@"))
    store.always.clear()
    local_path(store.url("shards/a.tar?X-Amz-Signature=hunter4", user="me:hunter5@"))
    assert "shards/a.tar?X-Amz-Signature=hunter4" in store.gets  # the store does get it
    kept = "".join(path.name for path in cache.rglob("*"))
    kept += "".join(path.read_text() for path in cache.rglob("*.json"))
    assert "hunter" not in str(caught.value) + kept


def test_a_copy_is_fetched_once_and_checked_by_size(store: Store) -> None:
    url = store.url("shards/a.tar")
    path = local_path(url)
    assert local_path(url) == path and len(store.gets) == 1
    os.truncate(path, 1000)
    assert local_path(url).read_bytes() == TAR and len(store.gets) == 2


def test_a_partial_file_is_never_taken_for_whole(store: Store, cache: Path) -> None:
    url = store.url("shards/a.tar")
    path = local_path(url)
    path.rename(path.with_suffix(".partial"))
    assert local_path(url).read_bytes() == TAR
    assert names(cache) == {".tar", ".json"}


def test_a_fetch_whose_process_is_killed_is_done_by_the_next(store: Store, cache: Path) -> None:
    """Its own child dies too, and gives up the lock: nothing waits for either."""
    store.faults["shards/a.tar"] = ["stall"]
    configure(stall_seconds=60.0)
    program = f"from contrastive.shards.storage import local_path; local_path({store.url('shards/a.tar')!r})"
    process = subprocess.Popen([sys.executable, "-c", program])
    try:
        deadline = time.monotonic() + PATIENCE
        while not list(cache.glob("shards/*.partial")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    started = time.monotonic()
    assert local_path(store.url("shards/a.tar")).read_bytes() == TAR
    assert time.monotonic() - started < 40  # the child would wait for a minute
    assert names(cache) == {".tar", ".json"}


def test_a_shard_that_the_store_replaced_is_fetched_anew_by_the_next_run(store: Store, tmp_path: Path) -> None:
    url = shards_of(store, tmp_path / "old")
    before = open_index(url)
    write_shards([r for r in records(16)[8:]], tmp_path / "new", samples_per_shard=4)
    store.files["shards/00001.tar"] = (tmp_path / "new" / "00001.tar").read_bytes()
    after = open_index(url)
    assert [before.key(i) for i in (0, 4)] == ["sample-000", "sample-004"]
    assert [after.key(i) for i in (0, 4)] == ["sample-000", "sample-012"]
    assert before.fingerprint != after.fingerprint
    assert [get for get in store.gets if get.endswith(".tar")].count("shards/00000.tar") == 1


def test_copies_serve_a_run_whose_store_does_not_answer(store: Store, tmp_path: Path) -> None:
    urls = expand(shards_of(store, tmp_path / "shards"))
    first = [batch.keys for batch in loader(urls)]
    store.files.clear()
    assert [batch.keys for batch in loader(urls)] == first


def test_fetching_again_changes_nothing_that_the_index_looks_at(store: Store) -> None:
    url = store.url("shards/a.tar")
    path = local_path(url)
    before = shard_stat(url)
    path.unlink()
    assert shard_stat(url) == before  # without fetching
    assert len(store.gets) == 1
    local_path(url)
    assert shard_stat(url) == before and path.stat().st_mtime_ns == before[1] < time.time_ns()
    store.files["shards/a.tar"] = TAR[::-1]
    path.unlink()
    local_path(url)
    assert path.stat().st_mtime_ns != before[1]


def test_the_least_recently_used_copies_go_when_the_cache_is_full(store: Store, cache: Path) -> None:
    urls = []
    for number, name in enumerate("bcde"):
        store.files[f"shards/{name}.tar"] = bytes([number]) * 1000
        urls.append(store.url(f"shards/{name}.tar"))
    paths = [local_path(url) for url in urls[:3]]
    opened = os.open(paths[1], os.O_RDONLY)
    for age, path in zip((200, 300, 100), paths, strict=True):
        os.utime(path.with_suffix(".json"), (time.time() - age,) * 2)
    configure(max_bytes=2500)
    paths.append(local_path(urls[3]))
    assert [path.exists() for path in paths] == [False, False, True, True]
    assert os.pread(opened, 10, 0) == bytes([1]) * 10  # a reader keeps what it has open
    os.close(opened)
    assert local_path(urls[0]).read_bytes() == bytes([0]) * 1000


def test_a_copy_just_handed_out_is_not_evicted(store: Store) -> None:
    configure(max_bytes=1000)
    store.files["shards/b.tar"] = TAR
    paths = [local_path(store.url(f"shards/{name}.tar")) for name in "ab"]
    assert all(path.exists() for path in paths)


def _small_files(program: str) -> subprocess.CompletedProcess[str]:
    """Run a program that can write no file above 100,000 bytes: for it the disk is full there."""
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )


def test_a_full_disk_names_the_folder_and_the_remedy_and_leaves_nothing(store: Store, cache: Path) -> None:
    program = f"""
from contrastive.shards.storage import ShardUnavailable, local_path
try:
    local_path({store.url("shards/a.tar")!r})
except ShardUnavailable as fault:
    print(fault.reason, "|", fault)
"""
    done = _small_files(program)
    assert done.stdout.startswith(f"shard unavailable | {cache}: no room for a shard (File too large); free some, set")
    assert len(store.gets) == 1
    assert names(cache) == set()


def test_an_index_names_the_url_the_reason_and_the_remedy(store: Store, tmp_path: Path) -> None:
    url = shards_of(store, tmp_path / "shards")
    store.always["shards/00001.tar"] = "503"
    with pytest.raises(UserError, match=r"shards/00001\.tar: HTTP 503 \(attempts: 3, .*\); check that the address"):
        open_index(url)


@pytest.mark.parametrize("path", ["shards/*.tar", "shards"])
def test_a_place_without_shards_is_an_error(store: Store, path: str) -> None:
    store.files.clear()
    with pytest.raises(UserError, match=r"\*\.tar: no shard there; a shard ends in \.tar"):
        expand(store.url(path))


def test_a_folder_and_a_glob_list_the_shards_of_the_store(store: Store) -> None:
    store.files = {f"shards/{name}": b"" for name in ("b.tar", "a.tar", "x.txt", "a0.tar")}
    urls = [store.url(f"shards/{name}.tar") for name in ("a", "a0", "b")]
    assert expand(store.url("shards")) == expand(store.url("shards/")) == urls
    assert expand(store.url("shards/a*.tar")) == urls[:2]


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_of_urls_are_those_of_the_local_folder(store: Store, tmp_path: Path, workers: int) -> None:
    url = shards_of(store, tmp_path / "shards")
    for ours, theirs in zip(loader(url, workers=workers), loader(str(tmp_path / "shards")), strict=True):
        assert ours.keys == theirs.keys and ours.valid.all()
        assert (ours.pixels == theirs.pixels).all()


def test_a_run_trains_from_urls(store: Store, tmp_path: Path) -> None:
    """The command line, end to end, with no shard on this machine's disk."""
    corpus = write_corpus(tmp_path / "corpus")
    recipe = write_recipe(corpus, tmp_path / "recipe.yaml")
    tar = corpus / "shards" / "00000.tar"
    store.files = {"shards/00000.tar": tar.read_bytes()}
    shutil.rmtree(corpus)
    url = store.url("shards/{00000..00000}.tar")
    overrides = [f"data.train={url}", f"data.validation={url}", "data.workers=1", "train.steps=3"]
    done = subprocess.run(
        [sys.executable, "-m", "contrastive", "train", str(recipe), *overrides], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "40 pairs" in done.stdout
    assert [get for get in store.gets if get.endswith(".tar")] == ["shards/00000.tar"]


def lose_copies(cache: Path, name: str) -> None:
    (path,) = cache.glob(f"shards/*-{name}.tar")
    path.unlink()


def test_a_forked_worker_fetches_what_its_parent_fetched_before(store: Store, cache: Path, tmp_path: Path) -> None:
    """The parent has talked to the store; an event loop inherited by fork would hang the worker."""
    batches = loader(shards_of(store, tmp_path / "shards"), workers=2)
    for name in ("00000", "00001"):
        lose_copies(cache, name)
    asked = len(store.gets)
    assert all(batch.valid.all() for batch in batches)
    assert sorted(store.gets[asked:]) == ["shards/00000.tar", "shards/00001.tar"]  # once, for two workers


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_lost_during_the_run_makes_its_samples_invalid(
    store: Store, cache: Path, tmp_path: Path, workers: int
) -> None:
    """Counted as "shard unavailable", in bounded time; the others' samples stay."""
    batches = loader(shards_of(store, tmp_path / "shards"), workers=workers)
    lose_copies(cache, "00001")
    store.always["shards/00001.tar"] = "500"
    started = time.monotonic()
    found = list(batches)
    assert time.monotonic() - started < 60
    valid = {key: bool(ok) for batch in found for key, ok in zip(batch.keys, batch.valid.tolist(), strict=True)}
    assert valid == {f"sample-{i:03d}": i < 4 for i in range(8)}
    assert sum(one.reason == "shard unavailable" for batch in found for one in batch.rejected) == 4


def train_on_rank(rank: int, world: int, url: str, cache: str, lost: str) -> list[tuple[str, bool]]:
    os.environ["CONTRASTIVE_CACHE"] = cache
    configure(**SETTINGS)
    batches = loader(url, rank=rank, world=world)
    import torch.distributed as dist

    dist.barrier()
    if lost and rank == 0:
        lose_copies(Path(cache), lost)
    dist.barrier()
    return [(k, bool(v)) for batch in batches for k, v in zip(batch.keys, batch.valid.tolist(), strict=True)]


@pytest.mark.parametrize("lost", ["", "00001"])
def test_two_ranks_share_the_cache(store: Store, cache: Path, tmp_path: Path, lost: str) -> None:
    """One download of each shard for both; a shard that is lost is invalid on both, and neither waits for ever."""
    url = shards_of(store, tmp_path / "shards")
    if lost:
        open_index(url)
        store.always[f"shards/{lost}.tar"] = "500"
    found = sum(run_ranks(2, train_on_rank, url, str(cache), lost), [])
    assert sorted(found) == [(f"sample-{i:03d}", not lost or i < 4) for i in range(8)]
    assert store.gets.count("shards/00000.tar") == 1
    assert json.loads(next(cache.glob("shards/*-00000.json")).read_text())["from"].endswith("shards/00000.tar")

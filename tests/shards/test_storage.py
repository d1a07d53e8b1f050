import os
from pathlib import Path

import pytest

from contrastive.errors import UserError
from contrastive.shards.download import identity, redact, remote_settings
from contrastive.shards.storage import configure, expand, index_folder, is_remote, local_path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("CONTRASTIVE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("CONTRASTIVE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(
    "shard", ["s3://b/x.tar", "gs://b/x", "hf://datasets/u/r", "https://h/x.tar", "pipe:cat x.tar"]
)
def test_urls_and_pipes_are_remote(shard: str) -> None:
    assert is_remote(shard)


@pytest.mark.parametrize("shard", ["x.tar", "/a/b.tar", "a:b/x.tar", "file:///a/x.tar", Path("x.tar")])
def test_paths_are_local(shard: str | Path) -> None:
    assert not is_remote(shard)


def test_a_local_path_is_itself(tmp_path: Path) -> None:
    assert local_path(tmp_path / "x.tar") == local_path(f"file://{tmp_path}/x.tar") == tmp_path / "x.tar"


@pytest.mark.parametrize(
    ("pattern", "shards"),
    [
        ("{08..11}.tar", ["08.tar", "09.tar", "10.tar", "11.tar"]),
        ("{9..11}.tar", ["10.tar", "11.tar", "9.tar"]),
        ("{0..2}.tar", ["0.tar", "1.tar", "2.tar"]),
        ("{a,b}/{0..1}.tar", ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]),
        ("{a,b{1,2}}.tar", ["a.tar", "b1.tar", "b2.tar"]),
        ("{a}.tar", ["{a}.tar"]),
        ("x.tar", ["x.tar"]),
    ],
)
def test_braces_are_expanded_as_a_shell_does(pattern: str, shards: list[str]) -> None:
    assert expand(f"https://host/{pattern}") == [f"https://host/{shard}" for shard in shards]


@pytest.mark.parametrize("pattern", ["{0..99999999999}.tar", "{a,b}" * 40 + ".tar"])
def test_braces_that_stand_for_too_many_shards_are_an_error(pattern: str) -> None:
    with pytest.raises(UserError, match="more than 1,000,000 shards"):
        expand(f"https://host/{pattern}")


def test_a_range_that_runs_backwards_is_an_error() -> None:
    with pytest.raises(UserError, match=r"the range \{9\.\.3\} is empty; give the smaller number first"):
        expand("https://host/{9..3}.tar")


def test_local_folders_globs_and_braces_are_expanded(tmp_path: Path) -> None:
    for name in ("00.tar", "01.tar", "10.tar", "x.txt", "{00,01}.tar"):
        (tmp_path / name).touch()
    everything = [f"{tmp_path}/{name}" for name in ("00.tar", "01.tar", "10.tar", "{00,01}.tar")]
    assert expand(tmp_path) == expand(f"file://{tmp_path}") == everything
    assert expand(f"{tmp_path}/0*.tar") == expand(f"{tmp_path}/{{00..01}}.tar") == everything[:2]
    assert expand(f"{tmp_path}/{{00,01}}.tar") == everything[-1:]  # a file of this very name


@pytest.mark.parametrize("pattern", ["absent", "{00..01}.tar", "*.tar"])
def test_a_path_that_stands_for_nothing_is_an_error(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        expand(tmp_path / pattern)


def test_a_url_with_a_query_stands_for_itself() -> None:
    assert expand("https://host/get?id=1") == ["https://host/get?id=1"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:secret@host/x.tar?sig=secret#secret", "https://host/x.tar"),
        (
            "ClientError: s3://key:secret@b/x.tar, url='https://h/y?token=secret'",
            "ClientError: s3://b/x.tar, url='https://h/y'",
        ),
        ("pipe:curl -H 'Authorization: secret' https://h/x.tar", "pipe:curl …"),
        ("https://host/a@b.tar", "https://host/a@b.tar"),
    ],
)
def test_credentials_are_not_shown(text: str, shown: str) -> None:
    assert redact(text) == shown


@pytest.mark.parametrize(
    "signed",
    [
        "https://u:p@h/x.tar?id=1&X-Amz-Signature=a&X-Amz-Date=1&X-Amz-Security-Token=t",
        "https://h/x.tar?id=1&X-Goog-Credential=a",
        "https://h/x.tar?Expires=1&Signature=a&AWSAccessKeyId=b&id=1",
        "https://h/x.tar?sv=1&se=2&sig=a&id=1&sp=r",
    ],
)
def test_a_shard_with_a_new_signature_is_the_same_shard(signed: str) -> None:
    assert identity(signed) == "https://h/x.tar?id=1"


@pytest.mark.parametrize("other", ["https://h/x.tar?id=2", "https://h/x.tar?st=1&id=1", "http://h/x.tar?id=1"])
def test_what_may_be_another_file_is_another_shard(other: str) -> None:
    assert identity(other) != identity("https://h/x.tar?id=1")
    assert identity("s3://b/x#1.tar") != identity("s3://b/x#2.tar") and identity("s3://b/?a") != identity("s3://b/?b")


def test_settings_reach_new_processes_through_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CONTRASTIVE_REMOTE_RETRIES", "CONTRASTIVE_CACHE_BYTES", "CONTRASTIVE_ALLOW_PIPE"):
        monkeypatch.setenv(name, "")  # so that they are put back
    configure(cache_dir=tmp_path / "c", retries=7, max_bytes=10**9, allow_pipe=True)
    environment = dict(os.environ)
    configure(allow_pipe=False, max_bytes=None)
    assert (remote_settings().allow_pipe, remote_settings().max_bytes) == (False, None)
    os.environ.update(environment)
    settings = remote_settings()
    assert (settings.cache_dir, settings.retries, settings.max_bytes, settings.allow_pipe) == (
        tmp_path / "c",
        7,
        10**9,
        True,
    )


@pytest.mark.parametrize(
    ("name", "value"), [("RETRIES", "many"), ("RETRIES", "-1"), ("STALL", "0"), ("DEADLINE", "nan")]
)
def test_a_setting_that_makes_no_sense_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"CONTRASTIVE_REMOTE_{name}", value)
    with pytest.raises(UserError, match=f"CONTRASTIVE_REMOTE_{name} {value}"):
        remote_settings()


def test_the_index_folder_is_told_by_the_list_and_not_by_signatures(cache: Path) -> None:
    folder = index_folder(["https://h/a.tar", "https://h/b.tar"])
    assert folder.is_dir() and cache in folder.parents
    assert folder == index_folder(["https://h/a.tar?sig=x", "https://h/b.tar?sig=y"])
    assert folder != index_folder(["https://h/a.tar"])


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CONTRASTIVE_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="file: cannot keep shards there .*; set CONTRASTIVE_CACHE to a folder"):
        index_folder(["https://h/a.tar"])


@pytest.mark.parametrize(
    ("absent", "url", "remedy"),
    [
        ("s3fs", "s3://bucket/x.tar", "pip install s3fs"),
        ("gcsfs", "gs://bucket/x.tar", "pip install gcsfs"),
        ("huggingface_hub", "hf://datasets/me/mine/x.tar", "pip install huggingface_hub"),
        ("aiohttp", "https://host/x.tar", r"pip install 'contrastive\[remote\]'"),
        ("fsspec", "https://host/x.tar", r"pip install 'contrastive\[remote\]'"),
    ],
)
def test_a_missing_driver_is_an_error_that_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, absent: str, url: str, remedy: str
) -> None:
    (tmp_path / f"{absent}.py").write_text(f"raise ModuleNotFoundError('No module named {absent}', name='{absent}')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for ask in (local_path, lambda shard: expand(f"{Path(shard).parent}*".replace(":/", "://", 1))):
        with pytest.raises(UserError, match=f"needs the package {absent}; {remedy}"):
            ask(url)


def test_a_scheme_without_a_driver_is_an_error() -> None:
    with pytest.raises(UserError, match="fsspec knows no driver for nonsense://"):
        local_path("nonsense://x.tar")

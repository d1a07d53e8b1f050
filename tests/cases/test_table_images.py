"""The image cells of tables: what is read, and why the others are not."""

import base64
import json
import random
import unicodedata
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from contrastive.shards import open_source

from ..shards.conftest import encoded

DATA = Path(__file__).parent / "data"


def found(folder: Path, values: list[Any], **options: Any) -> list[tuple[bytes | None, str | None, str | None]]:
    """What a table in a folder gives for image cells: bytes, fault, detail."""
    rows = [{"image": value, "caption": f"words {number}"} for number, value in enumerate(values)]
    (folder / "x.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return [(r.image, r.fault, r.detail) for r in open_source(folder / "x.jsonl", group=False, **options)]


# ---- files that cannot be read


def test_missing_files_show_the_path_that_was_looked_for() -> None:
    table = DATA / "csv_paths_missing" / "sub" / "pairs.csv"
    records = list(open_source(table))
    assert {record.fault for record in records} == {"no such file"}
    assert records[0].detail == str(table.parent.absolute() / "images" / "0.jpg")


def test_each_missing_file_is_named_with_its_line() -> None:
    table = DATA / "csv_some_missing" / "pairs.csv"
    missing = [(r.detail, r.place) for r in open_source(table) if r.fault == "no such file"]
    folder = table.parent.absolute()
    assert missing == [(f"{folder}/images/{n}.jpg", f"{table}: line {n + 2}") for n in (6, 7, 8)]


@pytest.mark.parametrize("seed", range(3))
def test_exactly_the_missing_files_are_faults(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    names = [f"a {n}/é{n}.png" for n in range(12)]
    gone = set(draw.sample(names, draw.randrange(1, 12)))
    for number, name in enumerate(names):
        if name not in gone:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(encoded(number))
    faults = [fault for _, fault, _ in found(tmp_path, names)]
    assert faults == ["no such file" if name in gone else None for name in names]


def test_paths_outside_the_folder_are_told_from_missing_ones() -> None:
    table = DATA / "csv_paths_outside" / "lists" / "p.csv"
    assert {r.fault for r in open_source(table, allow_outside=False)} == {"path outside the table's folder"}
    assert all(r.image and not r.fault for r in open_source(table, allow_outside=True))


def test_a_folder_and_a_name_that_no_file_has_are_faults(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    faults = [fault for _, fault, _ in found(tmp_path, ["folder.png", "a\0b.png", "x" * 5000, "", None, 7])]
    missing = "no such file"
    assert faults == ["a folder, not a file", missing, missing, None, None, "image is neither bytes nor a path"]


# ---- other spellings of a path


def test_absolute_windows_and_unicode_spellings_are_read(tmp_path: Path) -> None:
    name = unicodedata.normalize("NFD", "sub/é.png")
    (tmp_path / "sub").mkdir()
    (tmp_path / name).write_bytes(encoded(1))
    (tmp_path / "sub" / "b c.png").write_bytes(encoded(2))
    nfc = unicodedata.normalize("NFC", name)
    values = [nfc, name, nfc.replace("/", "\\"), str(tmp_path / name), "sub\\b c.png", " ./sub//b c.png "]
    values += [f"file://{quote(str(tmp_path))}/sub/b%20c.png"]
    images = [image for image, _, _ in found(tmp_path, values)]
    assert images == [encoded(1)] * 4 + [encoded(2)] * 3


# ---- URLs, data URIs and base64


def test_urls_are_told_with_what_to_do() -> None:
    records = list(open_source(DATA / "csv_url" / "pairs.csv"))
    assert {record.fault for record in records} == {"URL, not a file (download the images with img2dataset)"}
    assert records[0].detail == "https://example.org/0.jpg"


@pytest.mark.parametrize(
    "url", ["http://a.b/c.png", "HTTPS://a.b/c", "s3://bucket/c.png", "gs://b/c", "hf://datasets/x"]
)
def test_addresses_of_any_store_are_urls(tmp_path: Path, url: str) -> None:
    (_, fault, detail), _ = found(tmp_path, [url, "x.png"], allow_outside=False)
    assert (str(fault)[:3], detail) == ("URL", url)


def test_urlsafe_base64_of_a_tsv_file_is_read() -> None:
    records = list(open_source(DATA / "tsv_base64" / "pairs.tsv"))
    assert len(records) == 6 and all(r.image and r.image[:2] == b"\xff\xd8" and not r.fault for r in records)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("size", [(1, 1), (20, 16)])
def test_base64_of_every_format_gives_the_bytes(tmp_path: Path, format: str, size: tuple[int, int]) -> None:
    data = encoded(3, size, format)
    plain = base64.b64encode(data).decode()
    values = [plain, base64.urlsafe_b64encode(data).decode(), plain.rstrip("="), base64.encodebytes(data).decode()]
    values += [f"data:image/{format.lower()};base64,{plain}", f"data:image/x,{quote(data)}"]
    assert [image for image, _, _ in found(tmp_path, values)] == [data] * 6


def test_base64_that_is_cut_off_or_holds_other_characters_is_a_fault(tmp_path: Path) -> None:
    text = base64.b64encode(encoded(1)).decode()
    cut = text[: len(text) // 4 * 4 - 3]
    faults = [fault for _, fault, _ in found(tmp_path, [cut, text[:300] + "!" + text[300:], "data:image/png;base64,!"])]
    assert faults == ["base64 that cannot be read"] * 2 + ["data URI that cannot be read"]


def test_a_file_whose_name_is_like_base64_is_read_as_a_file(tmp_path: Path) -> None:
    (tmp_path / ("QkAAAA" + "A" * 60)).write_bytes(encoded(1))
    assert found(tmp_path, ["QkAAAA" + "A" * 60])[0][0] == encoded(1)


# ---- Parquet's types


@pytest.mark.parametrize(
    "kind",
    [
        pa.binary(),
        pa.large_binary(),
        pa.binary(len(encoded(1))),
        pa.dictionary(pa.int32(), pa.binary()),
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        pa.list_(pa.binary()),
    ],
    ids=str,
)
def test_bytes_of_every_type_are_read(tmp_path: Path, kind: Any) -> None:
    value: Any = encoded(1)
    value = {"bytes": value, "path": None} if pa.types.is_struct(kind) else [value] if pa.types.is_list(kind) else value
    pq.write_table(pa.table({"image": pa.array([value], kind), "caption": ["a"]}), tmp_path / "x.parquet")
    (record,) = open_source(tmp_path / "x.parquet")
    assert (record.image, record.fault) == (encoded(1), None)


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string()), pa.binary()], ids=str
)
def test_paths_of_every_type_are_read(tmp_path: Path, kind: Any) -> None:
    (tmp_path / "0.png").write_bytes(encoded(1))
    pq.write_table(pa.table({"image": pa.array(["0.png"], kind), "caption": ["a"]}), tmp_path / "x.parquet")
    (record,) = open_source(tmp_path / "x.parquet")
    assert (record.image, record.fault) == (encoded(1), None)


def test_several_images_in_a_row_are_a_fault(tmp_path: Path) -> None:
    images = [[{"bytes": encoded(n), "path": None} for n in range(count)] for count in (2, 1, 0)]
    pq.write_table(pa.table({"image": images, "caption": ["a", "b", "c"]}), tmp_path / "x.parquet")
    assert [(r.image, r.fault) for r in open_source(tmp_path / "x.parquet")] == [
        (None, "a list of images, not one"),
        (encoded(0), None),
        (None, None),
    ]

"""`contrastive shard` names the cause and the remedy where there is nothing to write, and lists what it skips."""

import csv
import io
import json
import random
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from contrastive.cli import main
from contrastive.shards import open_index

from ..shards.conftest import encoded

DATA = Path(__file__).parent / "data"
SEEDS = [0, 1]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def case(name: str) -> Path:
    """A copy of a case, as commands write indexes beside shards."""
    return Path(shutil.copytree(DATA / name, name))


def shard(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """The exit code and everything that is printed."""
    code = main(["shard", *map(str, arguments)])
    printed = capsys.readouterr()
    if code:
        assert printed.err.count("\n") == 1 and not Path(str(arguments[1])).exists()
    return code, printed.out + printed.err


def table(path: Path, images: Sequence[object], captions: Sequence[str], header: tuple[str, ...]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *zip(images, captions, strict=True)])
    return path


def words(draw: random.Random, count: int) -> list[str]:
    return [f"{draw.choice(['a', 'one', 'the'])} {draw.choice(['dog', 'cat', 'red door'])} {i}" for i in range(count)]


def rejected(dest: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in Path(dest, "rejected.jsonl").read_text(encoding="utf-8").splitlines()]


# ---- files that do not exist


def test_missing_files_show_a_path_that_was_looked_for(capsys: pytest.CaptureFixture[str]) -> None:
    folder = case("csv_paths_missing").absolute()
    code, said = shard(capsys, folder / "sub" / "pairs.csv", "out")
    assert code == 2
    assert f"{folder / 'sub' / 'images' / '0.jpg'}" in said
    assert "all 6 rows name a file that does not exist" in said and "relative to the table's folder" in said


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("column", ["image", "file_name", "path"])
def test_missing_files_of_other_tables(capsys: pytest.CaptureFixture[str], seed: int, column: str) -> None:
    draw = random.Random(seed)
    count = draw.randint(2, 9)
    names = [f"{draw.choice(['train/', '', 'a b/'])}{i}.{draw.choice(['png', 'JPG'])}" for i in range(count)]
    source = table(Path("lists", "x.csv"), names, words(draw, count), (column, "text"))
    code, said = shard(capsys, source, "out")
    assert code == 2
    assert f"all {count} rows name a file that does not exist" in said
    assert str(Path("lists", names[0]).absolute()) in said


def test_skipped_rows_are_listed_with_the_line_and_the_path(capsys: pytest.CaptureFixture[str]) -> None:
    folder = case("csv_some_missing").absolute()
    code, said = shard(capsys, folder / "pairs.csv", "out")
    assert code == 0 and f"listed in {Path('out', 'rejected.jsonl')}" in said
    with open(folder / "pairs.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    lost = [(number, row["filepath"]) for number, row in enumerate(rows) if not (folder / row["filepath"]).exists()]
    assert lost  # the case has some
    found = rejected("out")
    assert [line["detail"] for line in found] == [str(folder / name) for _, name in lost]
    assert all(str(number + 2) in line["place"] for (number, _), line in zip(lost, found, strict=True))
    assert f"skipped: {len(lost)} (no such file)" in said


@pytest.mark.parametrize("seed", SEEDS)
def test_skipped_rows_of_other_tables(capsys: pytest.CaptureFixture[str], seed: int) -> None:
    draw = random.Random(seed)
    count = draw.randint(10, 30)
    names = [f"{i}.png" for i in range(count)]
    lost = sorted(draw.sample(range(count), draw.randint(1, count - 1)))
    for i in set(range(count)) - set(lost):
        Path(names[i]).write_bytes(encoded(i))
    source = table(Path("x.csv"), names, words(draw, count), ("image", "caption"))
    assert shard(capsys, source, "out", "--samples-per-shard", 4)[0] == 0
    assert [Path(line["detail"]).name for line in rejected("out")] == [names[i] for i in lost]
    assert len(open_index("out")) == count - len(lost)


# ---- files outside the table's folder


def test_paths_outside_name_the_option(capsys: pytest.CaptureFixture[str]) -> None:
    folder = case("csv_paths_outside")
    code, said = shard(capsys, folder / "lists" / "p.csv", "out")
    assert code == 2 and "--allow-outside" in said and "--image" not in said
    assert shard(capsys, folder / "lists" / "p.csv", "out", "--allow-outside")[0] == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_paths_outside_of_other_tables(capsys: pytest.CaptureFixture[str], seed: int) -> None:
    draw = random.Random(seed)
    Path("pictures").mkdir()
    names = [f"{i}.png" for i in range(draw.randint(2, 6))]
    for i, name in enumerate(names):
        Path("pictures", name).write_bytes(encoded(i))
    paths = [draw.choice(["../pictures/", str(Path("pictures").absolute()) + "/"]) + name for name in names]
    source = table(Path("lists", "x.csv"), paths, words(draw, len(names)), ("image", "caption"))
    code, said = shard(capsys, source, "out")
    assert code == 2 and f"all {len(names)} rows name a file outside the table's folder" in said
    assert "--allow-outside" in said
    assert shard(capsys, source, "out", "--allow-outside")[0] == 0
    assert len(open_index("out")) == len(names)


# ---- URLs


def test_urls_name_img2dataset(capsys: pytest.CaptureFixture[str]) -> None:
    code, said = shard(capsys, case("csv_url") / "pairs.csv", "out")
    assert code == 2 and "URL" in said and "img2dataset" in said and "https://example.org/0.jpg" in said


@pytest.mark.parametrize("address", ["http://a.b/{}.png", "s3://bucket/{}", "HTTPS://a.b/?id={}"])
def test_urls_of_other_stores(capsys: pytest.CaptureFixture[str], address: str) -> None:
    source = table(Path("x.csv"), [address.format(i) for i in range(3)], ["a", "b", "c"], ("image", "caption"))
    code, said = shard(capsys, source, "out")
    assert code == 2 and "all 3 rows hold a URL" in said and "img2dataset" in said and address.format(0) in said


# ---- several causes, filters, captions


def test_several_causes_are_named_the_commonest_first(capsys: pytest.CaptureFixture[str]) -> None:
    images = ["a.png", "https://a.b/c.png", "../d.png", "https://a.b/e.png"]
    source = table(Path("lists", "x.csv"), images, ["a", "b", "c", "d"], ("image", "caption"))
    code, said = shard(capsys, source, "out")
    assert code == 2
    places = [said.index(text) for text in ("2 of 4 rows hold a URL", "1 of 4 rows names a file that does not exist")]
    assert places == sorted(places)
    assert "1 of 4 rows names a file outside" in said and "--allow-outside" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--min-size", 512], "all 3 rows are below --min-size 512 (such as *20 x 16"),
        (["--max-aspect", 1.1], "all 3 rows are above --max-aspect 1.1 (such as *20 x 16"),
        (["--min-caption", 30], "all 3 rows have captions below --min-caption 30 (such as *"),
        (["--max-caption", 2], "all 3 rows have captions above --max-caption 2 (such as *"),
    ],
)
def test_a_limit_that_leaves_nothing_is_named(
    capsys: pytest.CaptureFixture[str], options: list[object], said: str
) -> None:
    for i in range(3):
        Path(f"{i}.png").write_bytes(encoded(i))
    source = table(Path("x.csv"), ["0.png", "1.png", "2.png"], ["a dog", "a cat", "a door"], ("image", "caption"))
    code, printed = shard(capsys, source, "out", *options)
    before, _, after = said.partition("*")
    assert code == 2 and before in printed and printed.partition(before)[2].startswith(after)


def test_no_caption_column_lists_the_columns(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.png").write_bytes(encoded())
    source = table(Path("x.csv"), ["a.png"], ["a dog"], ("image", "worte"))
    code, said = shard(capsys, source, "out")
    assert code == 2 and "name the column with --caption; columns: image, worte" in said
    assert shard(capsys, source, "out", "--caption", "worte")[0] == 0


def test_an_empty_caption_column_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.png").write_bytes(encoded())
    source = table(Path("x.csv"), ["a.png", "a.png"], ["", " "], ("image", "caption"))
    code, said = shard(capsys, source, "out")
    assert code == 2 and "no caption in column 'caption'" in said


def test_images_without_sidecars_say_where_captions_belong(capsys: pytest.CaptureFixture[str]) -> None:
    Path("images").mkdir()
    for i in range(2):
        Path("images", f"{i}.png").write_bytes(encoded(i))
    code, said = shard(capsys, "images", "out")
    assert code == 2 and "all 2 rows have no caption" in said and ".txt" in said


def test_a_table_without_rows_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    code, said = shard(capsys, table(Path("x.csv"), [], [], ("image", "caption")), "out")
    assert code == 2 and "x.csv has no rows" in said


# ---- the destination


def test_a_destination_that_cannot_be_made_is_found_before_the_source_is_read(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("file").write_text("x")
    for dest in ("file", "file/out", "file/deep/out"):
        assert main(["shard", "no-such-source", dest]) == 2
        said = capsys.readouterr().err
        assert "file" in said and "no-such-source" not in said and said.count("\n") == 1


# ---- equal keys


def test_two_runs_of_img2dataset_keep_all_pairs(capsys: pytest.CaptureFixture[str]) -> None:
    folder = case("img2dataset_two_runs_same_keys")
    assert shard(capsys, folder, "out")[0] == 0
    names = [name for path in folder.glob("*.tar") for name in tarfile.open(path).getnames() if name.endswith(".txt")]
    index = open_index("out")
    rows = range(len(index))
    assert len(names) == 16 == len({index.key(i) for i in rows}) == len({index.image(i) for i in rows})


@pytest.mark.parametrize("runs", [2, 3])
def test_other_runs_keep_all_pairs(capsys: pytest.CaptureFixture[str], runs: int) -> None:
    from contrastive.shards import Record, write_shards

    Path("in").mkdir()
    for run in range(runs):
        records = [Record(f"{i:09d}", encoded(10 * run + i), (f"{run} {i}",)) for i in range(3 + run)]
        write_shards(records, f"run{run}")
        Path(f"run{run}/00000.tar").rename(f"in/{run}-00000.tar")
    assert shard(capsys, "in", "out", "--workers", 2, "--samples-per-shard", 2)[0] == 0
    index = open_index("out")
    assert {index.caption(i) for i in range(len(index))} == {
        f"{run} {i}" for run in range(runs) for i in range(3 + run)
    }


# ---- tars that cannot be read


@pytest.mark.parametrize("name", ["tar_gz"])
def test_a_compressed_tar_says_to_unpack_it(capsys: pytest.CaptureFixture[str], name: str) -> None:
    code, said = shard(capsys, case(name), "out")
    assert code == 2 and "compressed" in said and "00000.tar.gz" in said


def test_names_with_dots_say_that_a_key_ends_at_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    code, said = shard(capsys, case("tar_all_dotted"), "out")
    if code:  # or all pairs are read
        assert "first dot" in said
    else:
        assert len(open_index("out"))


@pytest.mark.parametrize("source", ["https://x.y/a.parquet", "s3://b/c", "-", "data:image/png;base64," + "A" * 300])
def test_a_source_that_is_no_path_says_what_it_is(capsys: pytest.CaptureFixture[str], source: str) -> None:
    code, said = shard(capsys, source, "out")
    what = "a URL, which" if "://" in source else "standard input" if source == "-" else "a data URI (image/png"
    assert code == 2 and what in said and "name th" in said


@pytest.mark.parametrize("layout", ["coco", "karpathy"])
@pytest.mark.parametrize("where", ["captions.json", "annotations/captions.json"])
def test_a_folder_of_images_with_one_captions_json_names_it(
    capsys: pytest.CaptureFixture[str], layout: str, where: str
) -> None:
    value: dict[str, object] = {"images": [{"id": 0, "file_name": "images/a.jpg"}]}
    value["annotations"] = [{"image_id": 0, "caption": "a"}]
    if layout == "karpathy":
        value = {"images": [{"filename": "images/a.jpg", "split": "train", "sentences": [{"raw": "a"}]}]}
    Path("coco", where).parent.mkdir(parents=True)
    Path("coco", where).write_text(json.dumps(value))
    Path("coco", "other.json").write_text("{}")
    Path("coco", "images").mkdir()
    Path("coco", "images", "a.jpg").write_bytes(encoded(0))
    code, said = shard(capsys, "coco", "out")
    assert (
        code == 2
        and f"give it by name: contrastive shard coco/{where} DEST" in said
        and "have a class folder" not in said
    )
    code, _ = shard(capsys, f"coco/{where}", "out")
    assert code == 0


@pytest.mark.parametrize("option", ["--no-group", "--group"])
def test_grouping_is_refused_where_there_are_no_rows(capsys: pytest.CaptureFixture[str], option: str) -> None:
    Path("pictures").mkdir()
    Path("pictures/a.jpg").write_bytes(encoded(0))
    Path("pictures/a.txt").write_text("a picture")
    code, said = shard(capsys, "pictures", "out", option)
    assert code == 2 and f"{option}: is for the rows of a table" in said


@pytest.mark.parametrize("packed", ["1.tar.gz", "1.tgz", "1.tar.zst"])
def test_compressed_tars_among_shards_are_refused_until_they_are_unpacked(
    capsys: pytest.CaptureFixture[str], packed: str
) -> None:
    folder = Path("mixed")
    folder.mkdir()
    for name in ("0.tar", "1.tar"):
        with tarfile.open(folder / name, "w") as tar:
            for member, data in ((f"{name}.jpg", encoded(0)), (f"{name}.txt", name.encode())):
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    (folder / packed).write_bytes(b"x")
    assert main(["check", "mixed"]) == 0  # an unpacked copy is there
    capsys.readouterr()
    (folder / "1.tar").unlink()
    assert main(["check", "mixed"]) == 2
    assert f"mixed/{packed}: a compressed tar; shards are read by offset, so unpack first" in capsys.readouterr().err
    assert shard(capsys, "mixed", "out")[0] == 2

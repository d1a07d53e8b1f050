"""CSV, TSV and JSON lines: every row is read whole, or an error names its line."""

import base64
import csv
import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contrastive.errors import UserError
from contrastive.shards import open_source

from ..shards.conftest import encoded

DATA = Path(__file__).parent / "data"
SENTENCES = ("a dog", "two cats", "a red door", "rain", "a bus on a road", "a plate of food")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Nine images, 0.png to 8.png."""
    for number in range(9):
        (tmp_path / f"{number}.png").write_bytes(encoded(number))
    return tmp_path


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


def refusal(path: Any, **options: Any) -> str:
    """The one line that reading a table ends with."""
    with pytest.raises(UserError) as caught:
        list(open_source(path, **options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- rows that do not fit the header


@pytest.mark.parametrize("case", ["csv_unquoted_comma", "csv_unquoted_comma_3_columns"])
def test_a_comma_that_is_not_quoted_names_the_line(case: str) -> None:
    assert "pairs.csv: line 2 has 4 fields, but the header names" in refusal(DATA / case / "pairs.csv")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("separator", [",", ";", "|", "\t"])
def test_a_row_of_another_width_names_its_line(folder: Path, seed: int, separator: str) -> None:
    draw = random.Random(seed)
    rows = [[f"{n}.png", draw.choice(SENTENCES), "cc-by"] for n in range(9)]
    bad = draw.randrange(9)
    rows[bad] = rows[bad][: draw.choice([1, 2])] if seed % 2 else [*rows[bad][:2], "more", *rows[bad][2:]]
    lines = ["filepath,title,licence".replace(",", separator), *map(separator.join, rows)]
    blank = draw.randrange(1, bad + 2)
    lines.insert(blank, "")  # an empty line counts as a line, and is no row
    found = refusal(write(folder / "x.csv", "\n".join(lines)))
    assert f"x.csv: line {bad + 3} has {len(rows[bad])} field" in found


def test_a_quote_at_the_start_of_tsv_captions_is_text() -> None:
    source = open_source(DATA / "tsv_quote_merges_rows" / "pairs.tsv")
    captions = [record.captions[0] for record in source]
    expected = ['"Stay hungry poster on a wall', "a red door", '"Stay foolish poster', "a monitor", "a bus", "rain"]
    assert captions == expected
    assert any("quotes are read as text" in note for note in source.notes)


@pytest.mark.parametrize("separator", ["\t", "|"])
@pytest.mark.parametrize("seed", range(3))
def test_quotes_that_enclose_no_cell_of_a_tab_separated_file_are_text(folder: Path, separator: str, seed: int) -> None:
    draw = random.Random(seed)
    captions = [draw.choice(['"', "", 'a 5" ']) + draw.choice(SENTENCES) for _ in range(8)] + ['"Stay']
    lines = [f"{n}.png{separator}{caption}" for n, caption in enumerate(captions)]
    path = write(folder / "x.tsv", "\n".join([f"filepath{separator}title", *lines]))
    assert [record.captions[0] for record in open_source(path)] == captions


@pytest.mark.parametrize(
    "rows",
    [
        '0.png\t"one\n1.png\t"two"\n2.png\tthree',
        '0.png\t"one\n1.png\ttwo"\n',
        '0.png\t"one ""large"" cat"\n1.png\t"two\n',
    ],
)
def test_a_tsv_file_of_quotes_with_two_meanings_is_never_read_as_fewer_rows(folder: Path, rows: str) -> None:
    path = write(folder / "x.tsv", "image\tcaption\n" + rows)
    try:
        found = list(open_source(path))
    except UserError as error:
        assert "line 2" in str(error) or "line 3" in str(error)
    else:
        assert len(found) == len(rows.splitlines())


@pytest.mark.parametrize("columns", ["image,caption", "image,caption,site"])
@pytest.mark.parametrize("seed", range(3))
def test_a_quote_that_is_not_closed_names_the_line_where_it_opens(folder: Path, columns: str, seed: int) -> None:
    draw = random.Random(seed)
    rows = [[f"{n}.png", draw.choice(SENTENCES), "x"][: columns.count(",") + 1] for n in range(9)]
    opened, closed = draw.randrange(4), draw.randrange(5, 9)
    rows[opened][1] = '"' + rows[opened][1]
    rows[closed][1] += draw.choice(["", '"'])
    path = write(folder / "x.csv", "\n".join([columns, *map(",".join, rows)]))
    assert f"line {opened + 2}" in refusal(path)


# ---- headers


def test_two_columns_of_one_name_are_named() -> None:
    found = refusal(DATA / "csv_duplicate_columns" / "pairs.csv")
    assert "two columns are named 'caption'" in found


@pytest.mark.parametrize("header", ["image,image,caption", "image,caption,x,x", '"image",caption,"caption"'])
def test_a_repeated_name_is_refused_wherever_it_is(folder: Path, header: str) -> None:
    path = write(folder / "x.csv", header + "\n" + ",".join("a" for _ in header.split(",")))
    assert "line 1: two columns are named" in refusal(path)


def test_two_spellings_of_the_caption_must_be_chosen_from(folder: Path) -> None:
    path = write(folder / "x.csv", "image,caption,Caption\n0.png,a,b\n")
    assert "columns 'caption' and 'Caption' could be the caption; name one with --caption" in refusal(path)
    assert [record.captions for record in open_source(path, caption="Caption")] == [("b",)]


def test_a_file_without_a_header_is_told_so() -> None:
    found = refusal(DATA / "csv_headerless" / "pairs.csv")
    assert "the first line was taken for the header" in found and "images/0.jpg,a picture of 0" in found


@pytest.mark.parametrize(
    "line", ["https://example.org/a,a cat", "0.png;a cat", "a cat|photos/x.JPG", "17,a cat", f"{'A' * 300}\ta cat"]
)
def test_a_first_line_of_data_is_shown(folder: Path, line: str) -> None:
    found = refusal(write(folder / "x.csv", f"{line}\n{line}\n"))
    assert "the first line was taken for the header" in found and line[:20] in found


@pytest.mark.parametrize(
    ("first", "separator"),
    [("image;title, alt", ";"), ("image,text;x", ","), ("sep=;\nimage;title", ";"), ("image|title", "|")],
)
def test_the_separator_is_the_one_that_gives_known_columns(folder: Path, first: str, separator: str) -> None:
    path = write(folder / "x.csv", f"{first}\n0.png{separator}a; cat\n".replace("a; cat", "a cat"))
    (record,) = open_source(path, caption="title, alt" if "alt" in first else None)
    assert record.image == encoded(0)


def test_a_separator_that_may_be_two_is_refused(folder: Path) -> None:
    found = refusal(write(folder / "x.csv", "image,caption;text\n0.png,a;b\n"))
    assert "separator may be a comma or a semicolon" in found


# ---- encodings


def test_the_line_that_is_not_utf8_is_counted_and_named() -> None:
    source = open_source(DATA / "csv_cp1252" / "pairs.csv")
    faults = [record.fault for record in source]
    assert faults == [None, None, "caption not UTF-8", None, None, None]
    assert any("line 4 not UTF-8" in note for note in source.notes)


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "cp1251", "gbk", "shift_jis"])
def test_rows_of_other_encodings_are_counted_one_by_one(folder: Path, encoding: str) -> None:
    odd = {"cp1251": "собака", "gbk": "红色的门", "shift_jis": "赤いドア"}.get(encoding, "café über")
    rows = [f"{n}.png,{odd if n in (2, 5) else 'plain'}" for n in range(9)]
    source = open_source(write(folder / "x.csv", "\n".join(["image,caption", *rows]), encoding))
    found = list(source)
    assert [n for n, record in enumerate(found) if record.fault == "caption not UTF-8"] == [2, 5]
    assert found[5].place == f"{folder / 'x.csv'}: line 7"
    assert any("line 4 and 1 more not UTF-8" in note for note in source.notes)


@pytest.mark.parametrize("column", ["key", "site", "label"])
def test_other_columns_that_are_not_utf8_are_counted(folder: Path, column: str) -> None:
    path = write(folder / "x.csv", f"image,caption,{column}\n0.png,a,é\n1.png,b,plain\n", "latin-1")
    first, second = open_source(path)
    assert str(first.fault).endswith("not UTF-8") and second.fault is None


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["x.csv", "x.jsonl"])
def test_wide_encodings_are_named(folder: Path, encoding: str, name: str) -> None:
    text = "image,caption\n0.png,a\n" if name == "x.csv" else '{"image": "0.png", "caption": "a"}\n'
    assert "save" in (found := refusal(write(folder / name, text, encoding)))
    assert encoding.upper()[:6] in found or "NUL byte" in found


@pytest.mark.parametrize("end", ["\r", "\n", "\r\n"])
def test_ends_of_lines_of_all_systems_are_read(folder: Path, end: str) -> None:
    path = write(folder / "x.csv", end.join(["image,caption", "0.png,a", "", "1.png,b", ""]), "utf-8-sig")
    assert [(r.captions, r.place) for r in open_source(path)] == [
        (("a",), f"{path}: line 2"),
        (("b",), f"{path}: line 4"),
    ]


# ---- what csv.writer writes is read as it was


CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
MARKED = st.lists(st.sampled_from(['"', ",", ";", "\t", "|", "\n", "\r", "a", " b", '""']), max_size=8).map("".join)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(st.tuples(CELLS | MARKED, CELLS | MARKED), min_size=1, max_size=6),
    separator=st.sampled_from(",;\t|"),
    end=st.sampled_from(["\n", "\r\n"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    cut=st.integers(1, 4),
)
def test_tables_of_csv_writer_are_read_exactly(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[str, str]],
    separator: str,
    end: str,
    quoting: Any,
    cut: int,
) -> None:
    folder = tmp_path_factory.mktemp("table")
    if any("\r" in cell for row in rows for cell in row):
        end = "\r\n"  # with "\n", csv.writer of Python 3.11 does not quote a carriage return, and cannot read it back
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, delimiter=separator, lineterminator=end, quoting=quoting)
    writer.writerow(["image", "caption", "note"])
    writer.writerows([f"{number}.png", *row] for number, row in enumerate(rows))
    text = buffer.getvalue()
    path = write(folder / "x.csv", text)
    try:
        source = open_source(path, caption="note")
        found = list(source._rows(source.cut(100)[0].segments[0]))  # type: ignore[attr-defined]
    except UserError as error:
        # in a file of tabs or bars, a cell may be such that another reading gives other rows
        assert separator in "\t|" or "goes over" in str(error)
        return
    assert [row["note"] for _, row in found] == [note for _, note in rows]
    assert [row["caption"] for _, row in found] == [caption for caption, _ in rows]
    assert [r for part in source.cut(cut) for r in source.read(part)] == list(source)


# ---- several files


@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_files_with_columns_in_any_order_give_the_same_records(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("tables")
    kind = data.draw(st.sampled_from(["csv", "jsonl", "parquet"]))
    rows = [{"image": f"{n}.png", "caption": f"words {n}", "label": f"c{n % 2}", "site": "x"} for n in range(6)]
    for number in range(3):
        names = data.draw(st.permutations(list(rows[0])))
        mine = [{name: row[name] for name in names} for row in rows[2 * number : 2 * number + 2]]
        path = folder / f"{number}.{kind}"
        if kind == "parquet":
            pa = pytest.importorskip("pyarrow")
            pytest.importorskip("pyarrow.parquet").write_table(pa.Table.from_pylist(mine), path)
        elif kind == "jsonl":
            write(path, "\n".join(map(json.dumps, mine)))
        else:
            separator = data.draw(st.sampled_from(",;\t|"))
            write(path, "\n".join(separator.join(line) for line in [names, *(row.values() for row in mine)]))
    found = list(open_source(f"{folder}/*.{kind}"))
    assert [(r.captions, r.label, r.meta) for r in found] == [
        ((r["caption"],), r["label"], {"site": "x"}) for r in rows
    ]


def test_a_file_without_a_column_that_is_used_is_named(folder: Path) -> None:
    write(folder / "a.csv", "image,caption\n0.png,a\n")
    write(folder / "b.csv", "image,words\n1.png,b\n")
    found = refusal(f"{folder}/*.csv")
    assert "b.csv: has no column 'caption' for the caption" in found and "image, words" in found


# ---- JSON lines


@pytest.mark.parametrize("first", [{"image": "0.png"}, {"caption": "a"}, {"license": "MIT"}])
def test_the_first_row_may_lack_a_column(folder: Path, first: dict[str, str]) -> None:
    rows = [first, {"image": "1.png", "caption": "b"}, {"caption": "c", "image": "2.png", "new": 1}]
    found = list(open_source(write(folder / "x.jsonl", "\n".join(map(json.dumps, rows)))))
    assert [(r.captions, r.image) for r in found[1:]] == [(("b",), encoded(1)), (("c",), encoded(2))]


def test_a_column_that_appears_late_does_no_harm(folder: Path) -> None:
    rows = [{"image": f"{n % 9}.png", "caption": f"{n}"} for n in range(150)]
    rows[140]["late"] = "x"
    found = list(open_source(write(folder / "x.jsonl", "\n".join(map(json.dumps, rows))), group=False))
    assert len(found) == 150 and found[140].meta == {"late": "x"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image": "0.png", "caption": "a", "caption": "b"}', "two values for 'caption'"),
        ('["0.png", "a"]', "not a JSON object"),
        ('{"image": ', "not JSON"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_json_line_that_cannot_be_used_is_named(folder: Path, line: str, message: str) -> None:
    path = write(folder / "x.jsonl", '{"image": "0.png", "caption": "a"}\n\n' + line + "\n")
    assert message in (found := refusal(path)) and "x.jsonl: line 3 " in found


@pytest.mark.parametrize("value", ["NaN", "Infinity", "null", '""', '"nan"', '"None"'])
def test_a_missing_label_is_no_class(folder: Path, value: str) -> None:
    path = write(folder / "x.jsonl", f'{{"image": "0.png", "label": "cat"}}\n{{"image": "1.png", "label": {value}}}\n')
    labels = [record.label for record in open_source(path)]
    assert labels == ["cat", None]


# ---- JSON lines: columns that appear late


def late(folder: Path, last: dict[str, Any], rows: int = 150) -> Path:
    """Rows with image and text, then one that differs."""
    plain = [{"image": f"{n % 9}.png", "text": f"words {n}"} for n in range(rows)]
    return write(folder / "late.jsonl", "\n".join(map(json.dumps, [*plain, last])))


@pytest.mark.parametrize("name", ["label", "class_name", "Category"])
def test_a_label_that_first_appears_late_is_refused_with_the_remedy(folder: Path, name: str) -> None:
    found = refusal(late(folder, {"image": "0.png", "text": "x", name: "cat"}))
    assert "late.jsonl: line 151" in found and f"'{name}'" in found and f"--label {name}" in found


@pytest.mark.parametrize(
    "row", [{"image": "0.png", "caption": "x"}, {"image": "0.png", "title": "x"}, {"url": "0.png", "text": "x"}]
)
def test_an_image_or_caption_under_another_name_than_before_is_refused(folder: Path, row: dict[str, Any]) -> None:
    assert "late.jsonl: line 151" in refusal(late(folder, row))


def test_a_late_label_that_is_named_is_read(folder: Path) -> None:
    table = late(folder, {"image": "0.png", "text": "x", "label": "cat"})
    assert [record.label for record in open_source(table, label="label", group=False)][-1] == "cat"


def test_late_columns_of_other_names_are_further_columns(folder: Path) -> None:
    table = late(folder, {"image": "0.png", "text": "x", "title": "more", "licence": "cc"})
    assert list(open_source(table, group=False))[-1].meta == {"title": "more", "licence": "cc"}


# ---- a header that is missing


def test_an_image_in_base64_is_no_column_name(tmp_path: Path) -> None:
    packed = base64.b64encode(encoded(0)).decode()
    found = refusal(write(tmp_path / "x.tsv", f"1\t{packed[:120]}\ta dog\n2\t{packed}\ta cat"))
    assert "taken for the header" in found and len(found) < 400


def test_long_names_of_columns_are_cut_in_messages(tmp_path: Path) -> None:
    found = refusal(write(tmp_path / "x.csv", f"a,{'b' * 150}\n1,2"))
    assert f"{'b' * 40}…" in found and "b" * 42 not in found.partition(" (")[0]

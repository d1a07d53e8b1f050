"""Labels and class names as a user gives them: on the command line, as text, JSON or CSV; never a guess."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from contrastive.errors import UserError
from contrastive.json_object import RepeatedKey, strict_object
from contrastive.wording import counted

COLUMNS = ("label", "labels", "name", "names", "class", "classes", "class_name", "label_name", "category")
KEYS = ("folder", "number", "id", "index", "key", "wnid", "code")  # columns of what is named
LISTS = ("labels", "names", "classes", "class_names", "categories")  # keys of a JSON object that hold the list
TEXT = ("", ".txt", ".labels", ".names", ".lst", ".list")


def read_labels(listed: str | None, file: str | None) -> list[str]:
    """The labels of `--labels` or `--labels-file`, without outer white space.

    `--labels` is one line of CSV: "red, shiny apple" in quotes is one label. A file holds one label a line (empty
    lines are skipped), one line of CSV, a JSON list of names, a JSON object with numbers as keys or as values
    ({"0": "cat"} or {"cat": 0}),
    or a table with a column named label, name or class (CSV, TSV, or separated by semicolons or vertical bars).

    Raises `UserError` for anything that could be read in two ways.
    """
    if file is None:
        labels = _split(listed or "", "--labels")
        if len(labels) == 1 and Path(labels[0]).is_file():
            raise UserError(f"--labels {labels[0]}: this is a file; use --labels-file")
        return labels
    where = f"--labels-file {file}"
    text = _read(where, file)
    suffix = Path(file).suffix.lower()
    if suffix in (".csv", ".tsv"):
        labels = _column(where, _rows(where, text, suffix))
    elif suffix == ".json" or _looks_like_json(text):
        labels = _of_json(where, _parsed(where, text))
    else:
        labels = _lines(where, text)
    if not labels:
        raise UserError(f"{where}: holds no label; write one a line")
    return labels


def read_class_names(file: str) -> dict[str, str] | list[str]:
    """The names of `--class-names`, see `class_name_map`: a JSON object {"folder": "name"}, a CSV of two columns
    (folder or number, name), or one name a line in order of the numbers.
    """
    where = f"--class-names {file}"
    text = _read(where, file)
    suffix = Path(file).suffix.lower()
    if suffix in (".csv", ".tsv"):
        return _pairs(where, _rows(where, text, suffix))
    if suffix == ".json" or _looks_like_json(text):
        found = _parsed(where, text)
        if isinstance(found, Mapping) and isinstance(found.get("id2label"), Mapping):
            found = found["id2label"]
        if isinstance(found, Mapping) and found and all(isinstance(name, str) for name in found.values()):
            return {key.strip(): name for key, name in found.items()}
        if isinstance(found, list):
            return _names(where, found)
        raise UserError(f'{where}: give one name a class, {{"1": "cat", "2": "dog"}}')
    return _lines(where, text)


def _looks_like_json(text: str) -> bool:
    text = text.strip()
    return text[:1] + text[-1:] in ("[]", "{}")


def _read(where: str, file: str) -> str:
    path = Path(file)
    if path.is_dir():
        raise UserError(f"{where}: is a folder; name a file")
    if not path.is_file():
        raise UserError(f"{where}: no such file")
    if path.suffix.lower() not in (*TEXT, ".csv", ".tsv", ".json"):
        raise UserError(f"{where}: {path.suffix} is not read; save the labels one a line, as .txt, or as JSON or CSV")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{where}: not UTF-8; save it as UTF-8") from None
    if "\0" in text:
        raise UserError(f"{where}: not text; save the labels one a line, as UTF-8")
    return text


def _split(line: str, where: str) -> list[str]:
    try:
        return [label.strip() for label in next(csv.reader([line], skipinitialspace=True, strict=True), [])]
    except csv.Error as fault:
        raise UserError(
            f'{where}: {fault}; write a label with a comma in double quotes, and its own quotes twice: cat,"red, shiny '
            'apple"'
        ) from None


def _lines(where: str, text: str) -> list[str]:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) == 1 and "," in lines[0]:
        return _split(lines[0], where)
    tab = next((number for number, line in enumerate(text.splitlines(), 1) if "\t" in line.strip()), None)
    if tab is not None:
        raise UserError(f"{where}: line {tab} has a tab, as a table has; save it as .tsv with a column named label")
    if lines and "," in lines[0] and set(_heads(lines[0].split(","))) & set(COLUMNS):
        raise UserError(f"{where}: the first line looks like the header of a table; save it as .csv")
    if len(lines) > 1 and all(len(line) > 1 and line[0] == line[-1] == '"' for line in lines):
        return [_one(where, line) for line in lines]
    marks = [re.match(r"(\d+)\s*[:.,)=\s]\s*\S", line) for line in lines]
    numbers = [int(mark[1]) for mark in marks if mark]
    if len(lines) > 1 and len(numbers) == len(lines) and numbers in (_count(lines, 0), _count(lines, 1)):
        raise UserError(
            f"{where}: the lines are numbered ('{lines[0]}'); leave the numbers out, or give JSON "
            '{"0": "cat", "1": "dog"}, or a JSON list where they are part of the labels'
        )
    return lines


def _one(where: str, line: str) -> str:
    cells = _split(line, where)
    if len(cells) != 1:
        raise UserError(f"{where}: '{line}' holds several columns; save it as .csv with a column named label")
    return cells[0]


def _count(lines: list[str], first: int) -> list[int]:
    return list(range(first, first + len(lines)))


def _heads(cells: list[str]) -> list[str]:
    return [cell.strip().lower() for cell in cells]


def _parsed(where: str, text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=strict_object)
    except RepeatedKey as key:
        raise UserError(f"{where}: the key '{key}' is given twice; keep one") from None
    except ValueError as fault:
        raise UserError(f"{where}: not JSON ({fault}); write one label a line, or a JSON list of names") from None


def _of_json(where: str, found: Any) -> list[str]:
    if isinstance(found, Mapping) and isinstance(found.get("id2label"), Mapping):  # config.json of the Hugging Face hub
        found = found["id2label"]
    if isinstance(found, Mapping) and len(found) == 1 and next(iter(found)) in LISTS:
        found = next(iter(found.values()))
    if isinstance(found, list):
        return _names(where, found)
    if isinstance(found, Mapping) and found:
        keys, values = list(found), list(found.values())
        if all(re.fullmatch(r"\d+", key.strip()) for key in keys) and all(isinstance(one, str) for one in values):
            return [name for _, name in sorted(zip(map(int, keys), values, strict=True))]
        if all(isinstance(one, int) and not isinstance(one, bool) for one in values) and len(set(values)) == len(keys):
            return sorted(keys, key=found.__getitem__)
        if all(isinstance(one, (list, str)) for one in values):
            raise UserError(
                f"{where}: an object of texts: are '{keys[0]}' and the others the labels, or their values? Give the "
                "labels as a list, and prompts by label with --templates FILE.json"
            )
    raise UserError(f'{where}: holds no list of names; write ["cat", "dog"] or {{"0": "cat", "1": "dog"}}')


def _names(where: str, found: list[Any]) -> list[str]:
    for number, one in enumerate(found, 1):
        if not isinstance(one, str):
            raise UserError(f"{where}: entry {number} is {json.dumps(one)}, no text; write a list of names")
    return [one.strip() for one in found]


def _rows(where: str, text: str, suffix: str) -> list[list[str]]:
    from contrastive.shards.csv_table import NAMES

    mark = _separator(where, text, suffix)
    reader = csv.reader(text.splitlines(keepends=True), delimiter=mark, skipinitialspace=True, strict=True)
    try:
        rows = [[cell.strip() for cell in row] for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as fault:
        raise UserError(f"{where}: line {reader.line_num}: {fault}; check the quotes") from None
    if not rows:
        raise UserError(f"{where}: empty; the first line names the columns")
    uneven = next((number for number, row in enumerate(rows, 1) if len(row) != len(rows[0])), None)
    if uneven is not None:
        raise UserError(
            f"{where}: row {uneven} has {counted(len(rows[uneven - 1]), 'column')}, the first has {len(rows[0])}; "
            f"put labels with {NAMES[mark]} in quotes"
        )
    return rows


def _separator(where: str, text: str, suffix: str) -> str:
    """The separator that divides the first line into columns of which most have a known name, as tables find it."""
    from contrastive.shards.csv_table import NAMES, SEPARATORS

    first = next((line for line in text.splitlines() if line.strip()), "")
    divided = {
        mark: _heads(next(csv.reader([first], delimiter=mark, skipinitialspace=True), [])) for mark in SEPARATORS
    }
    several = {mark: len({*COLUMNS, *KEYS} & set(heads)) for mark, heads in divided.items() if len(heads) > 1}
    if not several:
        return "\t" if suffix == ".tsv" else ","
    best = [mark for mark in several if several[mark] == max(several.values())]
    usual = "\t" if suffix == ".tsv" else ","
    if len(best) > 1 and usual not in best:
        choices = " or ".join(NAMES[mark] for mark in best)
        raise UserError(f"{where}: the separator may be {choices}, by the first line '{first[:80]}'; use one of them")
    return best[0] if len(best) == 1 else usual


def _column(where: str, rows: list[list[str]]) -> list[str]:
    heads = _heads(rows[0])
    known = [place for place, head in enumerate(heads) if head in COLUMNS]
    if len(known) != 1 and len(rows) == 1 and not known:
        return rows[0]  # one line of labels
    if len(known) != 1:
        found = "several of its columns" if known else "none of its columns"
        raise UserError(
            f"{where}: {found} may hold the labels ({', '.join(rows[0])}); name one of them label, or save the labels "
            "one a line as .txt"
        )
    cells = [row[known[0]] for row in rows[1:]]
    if "" in cells:
        raise UserError(f"{where}: row {cells.index('') + 2} has no label; remove it")
    return cells


def _pairs(where: str, rows: list[list[str]]) -> dict[str, str]:
    if len(rows[0]) != 2:
        raise UserError(f"{where}: {len(rows[0])} columns; give two, the folder or number and its name")
    heads = _heads(rows[0])
    named = {*KEYS, *COLUMNS} & set(heads)
    body = rows[1:] if len(named) == 2 or (named and not any(head.isdigit() for head in heads)) else rows
    if len(named) == 2 and heads[0] in ("name", "names", "class_name", "label_name"):
        body = [row[::-1] for row in body]
    keys = [row[0] for row in body]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise UserError(f"{where}: '{twice}' is given twice; give each folder once")
    return {key: name for key, name in body}

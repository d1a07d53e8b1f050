"""JSON lines: one object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from contrastive.errors import UserError
from contrastive.json_object import RepeatedKey, strict_object
from contrastive.shards.tables import CAPTION_NAMES, IMAGE_NAMES, LABEL_NAMES, SAMPLE
from contrastive.shards.text_lines import Lines
from contrastive.shards.text_tables import Placed, TextSource
from contrastive.wording import one_line


class JsonLinesSource(TextSource):
    """One JSON object a line.

    The columns are all names in the first SAMPLE lines of each file. Columns that are named are looked for further on.
    An image, caption or label that first appears after these lines, under a name that would have been guessed, is an
    error.
    """

    kind = "jsonl"

    def __init__(
        self,
        files: list[Path],
        image: str | None,
        caption: str | None,
        label: str | None,
        group: bool | None = None,
    ) -> None:
        self._named = {name for name in (image, caption, label) if name is not None}
        self._expected: frozenset[str] | None = None  # the names that need no look, once the columns are known
        super().__init__(files, image, caption, label, group)
        self._roles = [
            (role, column, guesses)
            for role, named, column, guesses in (
                ("image", image, self.image_column, IMAGE_NAMES),
                ("caption", caption, self.caption_column, CAPTION_NAMES),
                ("label", label, self.label_column, LABEL_NAMES),
            )
            if named is None
        ]
        self._expected = frozenset(self.columns)

    def _read_columns(self, file: int) -> list[str]:
        names: dict[str, None] = {}
        empty = True
        for number, (_, _, row) in enumerate(self._placed(Lines(self.files[file]), file), 1):
            names.update(dict.fromkeys(row))
            empty = False
            if number >= SAMPLE and self._named <= names.keys():
                break
        if empty:
            raise UserError(f"{self.files[file]}: empty; give one JSON object a line")
        return list(names)

    def _needed(self) -> dict[str, str | None]:
        return {**super()._needed(), "label": None}  # an object without a value may leave its name out

    def _placed(self, lines: Lines, file: int) -> Iterator[Placed]:
        before = lines.at
        for line in lines:
            if line.strip():
                row = self._parsed(line, lines)
                if self._expected is not None and not row.keys() <= self._expected:
                    self._check_late(row, lines)
                yield before, lines.number, row
            before = lines.at

    def _check_late(self, row: Mapping[str, Any], lines: Lines) -> None:
        """Raise UserError where a row holds its image, caption or label under a name that is no column yet."""
        for name in row:
            if name in self.columns or row[name] is None:
                continue
            if name.lower() not in {*IMAGE_NAMES, *CAPTION_NAMES, *LABEL_NAMES}:
                self._expected = frozenset({name}).union(self._expected or ())
                continue
            for role, column, guesses in self._roles:
                if name.lower() in guesses and (column is None or row.get(column) is None):
                    if column is None:
                        remedy = f"give the first line '{name}' too (null without a value)"
                        remedy += f", or choose it with --{role} {name} where the command has this option"
                    else:
                        remedy = f"name the {role} '{column}' in every row, as the rows before"
                    raise UserError(
                        f"{lines.path}: line {lines.number} is the first with the column '{name}', but columns are "
                        f"found in the first {SAMPLE} lines; {remedy}"
                    )

    def _parsed(self, line: str, lines: Lines) -> dict[str, Any]:
        where = f"{lines.path}: line {lines.number}"
        try:
            row = json.loads(line, object_pairs_hook=strict_object, parse_constant=_missing)
        except RepeatedKey as name:
            raise UserError(f"{where} has two values for '{name}'; keep one") from None
        except (ValueError, RecursionError) as fault:
            what = "nested too deeply" if isinstance(fault, RecursionError) else one_line(fault)
            what = "a number of too many digits" if "set_int_max_str_digits" in what else what
            remedy = "; give one JSON object a line" if line.lstrip()[:1] == "[" or line.strip() == "{" else ""
            raise UserError(f"{where} is not JSON ({what}){remedy}") from None
        if not isinstance(row, dict):
            raise UserError(f"{where} is not a JSON object; give one JSON object a line")
        return row


def _missing(constant: str) -> None:
    """NaN and Infinity, which are no JSON but which programs write, are no value."""

"""JSON lines: one object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from contrastive.errors import UserError
from contrastive.json_object import RepeatedKey, strict_object
from contrastive.shards.tables import SAMPLE
from contrastive.shards.text_lines import Lines
from contrastive.shards.text_tables import Placed, TextSource
from contrastive.wording import one_line


class JsonLinesSource(TextSource):
    """One JSON object a line. The columns are all names in the first SAMPLE lines of each file."""

    kind = "jsonl"

    def _read_columns(self, file: int) -> list[str]:
        names: dict[str, None] = {}
        empty = True
        for _, (_, _, row) in zip(range(SAMPLE), self._placed(Lines(self.files[file]), file), strict=False):
            names.update(dict.fromkeys(row))
            empty = False
        if empty:
            raise UserError(f"{self.files[file]}: empty; give one JSON object a line")
        return list(names)

    def _needed(self) -> dict[str, str | None]:
        return {**super()._needed(), "label": None}  # an object without a value may leave its name out

    def _placed(self, lines: Lines, file: int) -> Iterator[Placed]:
        before = lines.at
        for line in lines:
            if line.strip():
                yield before, lines.number, self._parsed(line, lines)
            before = lines.at

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

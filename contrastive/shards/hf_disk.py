"""A data set as `save_to_disk` of Hugging Face's `datasets` writes it: Arrow files beside two of JSON.

Read with pyarrow alone: no loading script is looked for and nothing is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from contrastive.errors import UserError
from contrastive.shards.record import Segment
from contrastive.shards.tables import TableSource, rows_between


def is_saved_dataset(folder: Path) -> bool:
    """Whether `folder` was written by `save_to_disk`. Raises UserError for a folder of several splits."""
    if (folder / "dataset_dict.json").is_file():
        splits = _json(folder / "dataset_dict.json").get("splits", [])
        named = ", ".join(str(folder / str(split)) for split in splits)
        raise UserError(f"{folder}: holds several splits; give one of them: {named}")
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


class DiskSource(TableSource):
    """The rows of a saved data set; numbers of a ClassLabel become its names."""

    kind = "datasets"

    def __init__(self, folder: Path, image: str | None, caption: str | None, label: str | None) -> None:
        state = _json(folder / "state.json")
        if state.get("_indices_files") or state.get("_indices_data_files"):
            raise UserError(f"{folder}: saved with a selection of rows; call flatten_indices() before save_to_disk()")
        names = [str(entry["filename"]) for entry in state.get("_data_files", [])]
        if not names or any(Path(name).name != name for name in names):
            raise UserError(f"{folder}/state.json: names no data files in this folder; save the data set again")
        features = _json(folder / "dataset_info.json").get("features") or {}
        self.names: dict[str, list[str]] = {
            column: feature["names"]
            for column, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
        super().__init__([folder / name for name in names], image, caption, label)

    def _read_columns(self) -> list[str]:
        return list(self._open(self.files[0]).schema.names)

    def _open(self, file: Path) -> Any:
        import pyarrow

        try:
            return pyarrow.ipc.open_stream(pyarrow.memory_map(str(file)))
        except (pyarrow.ArrowInvalid, OSError) as fault:
            raise UserError(f"{file}: not an Arrow file ({str(fault).splitlines()[0]})") from None

    def _row_starts(self) -> Iterator[Iterable[int]]:
        for file in self.files:
            yield range(sum(batch.num_rows for batch in self._open(file)))

    def _rows(self, segment: Segment) -> Iterator[Mapping[str, Any]]:
        for row in rows_between(self._open(self.files[segment.file]), segment):
            yield {**row, **{column: self._name(column, row.get(column)) for column in self.names}}

    def _name(self, column: str, number: Any) -> Any:
        names = self.names[column]
        return names[number] if isinstance(number, int) and 0 <= number < len(names) else None


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as fault:
        raise UserError(f"{file}: not readable ({str(fault).splitlines()[0]}); save the data set again") from None
    return value if isinstance(value, dict) else {}

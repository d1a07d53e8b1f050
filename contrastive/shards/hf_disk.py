"""A data set as `save_to_disk` of Hugging Face's `datasets` writes it: Arrow files beside two of JSON.

Read with pyarrow alone: no loading script is looked for and nothing is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from contrastive.errors import UserError
from contrastive.shards.parquet_table import ArrowSource, rows_between
from contrastive.shards.record import Segment
from contrastive.shards.tables import Row
from contrastive.wording import one_line


def saved_splits(folder: Path) -> list[str]:
    """The splits of a folder that `DatasetDict.save_to_disk` wrote; [] for any other folder."""
    if not (folder / "dataset_dict.json").is_file():
        return []
    return [str(split) for split in _json(folder / "dataset_dict.json").get("splits", [])]


def is_saved_dataset(folder: Path) -> bool:
    """Whether `folder` was written by `Dataset.save_to_disk`, which writes one split."""
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


class DiskSource(ArrowSource):
    """The rows of a saved data set; numbers of a ClassLabel become its names."""

    kind = "datasets"

    def __init__(
        self, folder: Path, image: str | None, caption: str | None, label: str | None, group: bool | None = None
    ) -> None:
        state = _json(folder / "state.json")
        if state.get("_indices_files") or state.get("_indices_data_files"):
            raise UserError(f"{folder}: saved with a selection of rows; call flatten_indices() before save_to_disk()")
        names = [str(entry["filename"]) for entry in state.get("_data_files", [])]
        if not names or any(Path(name).name != name for name in names):
            raise UserError(f"{folder}/state.json: names no data files in this folder; save the data set again")
        if missing := [name for name in names if not (folder / name).exists()]:
            raise UserError(
                f"{folder / missing[0]}: is missing, and state.json names it; copy it, or save the set again"
            )
        self.features = _json(folder / "dataset_info.json").get("features") or {}
        super().__init__([folder / name for name in names], image, caption, label, group)

    def _features(self, file: int) -> Mapping[str, Any]:
        return self.features

    def _schema(self, file: int) -> Any:
        return self._open(self.files[file]).schema

    def _length(self, file: int) -> int:
        return sum(batch.num_rows for batch in self._open(self.files[file]))

    def _open(self, file: Path) -> Any:
        import pyarrow

        try:
            return pyarrow.ipc.open_stream(pyarrow.memory_map(str(file)))
        except (pyarrow.ArrowInvalid, OSError) as fault:
            raise UserError(f"{file}: not an Arrow file ({one_line(fault)})") from None

    def _rows(self, segment: Segment, columns: Sequence[str] | None = None) -> Iterator[Row]:
        batches = self._open(self.files[segment.file])
        if columns is None:
            return rows_between(batches, segment)
        known = [column for column in columns if column in self.headers[segment.file]]
        return rows_between((batch.select(known) for batch in batches), segment)


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as fault:
        raise UserError(f"{file}: not readable ({one_line(fault)}); save the data set again") from None
    return value if isinstance(value, dict) else {}

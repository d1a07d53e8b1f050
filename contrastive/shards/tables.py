"""Rows of a table as records: which columns are used, and what their cells mean."""

from __future__ import annotations

import itertools
import math
import sys
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from contrastive.errors import UserError
from contrastive.shards.grouping import Layout, joined, merge_more, roles_of
from contrastive.shards.record import APART, BEFORE, OWN, Part, Record, Segment, Source
from contrastive.shards.table_images import ImageReader, image_name, path_of
from contrastive.shards.table_values import captions_of, is_listed, is_utf8, label_of
from contrastive.wording import short

IMAGE_NAMES = (
    "image",
    "img",
    "image_path",
    "img_path",
    "filepath",
    "file_path",
    "filename",
    "file_name",
    "image_name",
    "image_file",
    "file",
    "path",
    "jpg",
    # columns of addresses: every row is then counted with what to do
    "url",
    "image_url",
    "img_url",
)
CAPTION_NAMES = (
    "caption",
    "text",
    "title",
    "description",
    "alt_text",
    "alt",
    "sentence",
    "comment",
    "txt",
    "captions",
)
LABEL_NAMES = ("label_name", "label", "class_name", "class", "category")
GROUPED = "grouped by image"  # the start of the note about it
SAMPLE = 100  # first rows of a file that are read to find the columns of JSON lines, and captions that are lists

Row = tuple[int, Mapping[str, Any]]  # where it is (the line or the number, from 1), and the cells by column


class TableSource(Source):
    """Rows of one or several files, read by the names of their columns.

    group: rows with the same image are one record with several captions. None: where the cells are text, such as
    paths, and the table has captions. True: also where they hold the bytes. False: every row is a record.
    allow_outside: read images by paths that leave the table's folder.
    """

    allow_outside = True
    unit = "row"  # of a place in a file
    begins = ""  # the end of an error about a missing column

    def __init__(
        self,
        files: list[Path],
        image: str | None,
        caption: str | None,
        label: str | None,
        group: bool | None = None,
    ) -> None:
        self.files, self.group = files, group
        self.headers = [self._read_columns(number) for number in range(len(files))]
        self.columns = list(dict.fromkeys(itertools.chain(*self.headers)))
        self.image_column = self._find("image", image, IMAGE_NAMES)
        self.caption_column = self._find("caption", caption, CAPTION_NAMES)
        self.label_column = self._find("label", label, LABEL_NAMES)
        self._label_named = label is not None
        used = {"key", "captions", "label", self.image_column, self.caption_column, self.label_column}
        self._used = frozenset(used)
        self._check_files()
        self._known: Layout | None = None
        self._readers: dict[int, ImageReader] = {}

    # ---- what a kind of file brings

    def _read_columns(self, file: int) -> list[str]:
        raise NotImplementedError

    def _rows(self, segment: Segment, columns: Sequence[str] | None = None) -> Iterator[Row]:
        """The rows of a segment: fewer where the file ends before. columns: those that are needed, None for all."""
        raise NotImplementedError

    def _places(self, file: int, note: Callable[[Mapping[str, Any]], None] | None) -> tuple[Any, Any]:
        """Where the rows of a file lie and on which lines, see `Layout`; `note` is called with each of them."""
        raise NotImplementedError

    def _has_paths(self) -> bool:
        """Whether the image cells are text."""
        raise NotImplementedError

    def _class_names(self, file: int) -> Mapping[str, list[str]]:
        """The names of classes by column, for columns that hold their numbers."""
        return {}

    # ---- columns

    def _find(self, role: str, named: str | None, guesses: tuple[str, ...]) -> str | None:
        found = ", ".join(map(short, self.columns))
        if named is not None:
            if named not in self.columns:
                raise UserError(f"{self.files[0]}: no column '{named}' for the {role}; columns: {found}{self.begins}")
            return named
        for guess in guesses:
            matches = [column for column in self.columns if column.lower() == guess]
            if len(matches) > 1:
                both = "' and '".join(matches)
                raise UserError(f"{self.files[0]}: columns '{both}' could be the {role}; name one with --{role}")
            if matches:
                return matches[0]
        if role == "image":
            raise UserError(f"{self.files[0]}: no column looks like the image; name one of: {found}{self.begins}")
        return None

    def _check_files(self) -> None:
        for number, (file, header) in enumerate(zip(self.files, self.headers, strict=True)):
            for role, column in self._needed().items():
                if column is not None and column not in header:
                    raise UserError(
                        f"{file}: has no column '{column}' for the {role}, as other files have; its columns: "
                        f"{', '.join(map(short, header))}; rename it, or give the files one by one"
                    )
            label = self.label_column
            if (label in self._class_names(number)) != (label in self._class_names(0)):
                raise UserError(f"{file}: only some files name the classes of column '{label}'; give them one by one")

    def _needed(self) -> dict[str, str | None]:
        return {"image": self.image_column, "caption": self.caption_column, "label": self.label_column}

    def identity(self) -> dict[str, Any]:
        columns = [self.image_column, self.caption_column, self.label_column]
        return {
            **super().identity(),
            "columns": columns,
            "allow_outside": self.allow_outside,
            "group": self.group,
        }

    # ---- rows and records

    @property
    def _layout(self) -> Layout:
        """Where the rows are; found once, by reading every file (of Parquet with paths: three columns)."""
        if self._known is None:
            self._known = self._read_layout()
        return self._known

    @property
    def grouped(self) -> int:
        return self._layout.rows - self._layout.records

    @property
    def notes(self) -> list[str]:
        found = []
        layout = self._layout
        if self.grouped:
            found.append(f"{GROUPED}: {layout.rows:,} rows became {layout.records:,} samples")
        return [*found, *self.caption_notes]

    @property
    def caption_notes(self) -> list[str]:
        if not self._layout.rows or not self._lists:  # lists are counted where the layout is read
            return []
        what = "1 row holds a list" if self._lists == 1 else f"{self._lists:,} rows hold a list"
        return [f"captions: {what} written as text, which is read as several captions"]

    def cut(self, size: int) -> list[Part]:
        return self._layout.cut(size, self.limit)

    def _count(self) -> int:
        return self._layout.records

    def _records(self) -> Iterator[Record]:
        if self._grouping():
            return self.read(self._layout.part(0, 0, self._layout.rows))
        whole = tuple(Segment(file, 0, sys.maxsize) for file in range(len(self.files)))
        return self.read(Part(0, 0, whole))

    def read(self, part: Part) -> Iterator[Record]:
        rows = ((segment.file, at, row) for segment in part.segments for at, row in self._rows(segment))
        if not part.roles:
            for number, (file, at, row) in enumerate(rows, part.row):
                yield self._record(number, file, at, row)
            return
        held: tuple[int, Record] | None = None
        captions: list[str] = []
        labels: list[str] = []
        for number, (file, at, row) in enumerate(rows):
            role = part.roles[number]
            if role == OWN:
                if held is not None:
                    yield joined(held[1], captions, labels, part.more.get(held[0]))
                held, captions, labels = (number, self._record(part.row + number, file, at, row)), [], []
            elif role == BEFORE:
                self._add_texts(file, row, captions, labels)
        if held is not None:
            yield joined(held[1], captions, labels, part.more.get(held[0]))

    def _record(self, number: int, file: int, at: int, row: Mapping[str, Any]) -> Record:
        reader = self._readers.get(file)
        if reader is None or reader.allow_outside != self.allow_outside:
            reader = self._readers[file] = ImageReader(self.files[file].parent, self.allow_outside)
        key = row.get("key")
        place = f"{self.files[file]}: {self.unit} {at}"
        image, fault, detail = reader.read(row.get(self.image_column))  # type: ignore[arg-type]
        captions, wrong, about = self._captions(row)
        label, odd = self._label(file, row)
        meta = self._meta(file, row)
        if not (wrong or odd) and not all(map(is_utf8, (key, *meta.values()))):
            odd = "key or another column not UTF-8"
        if fault is None and (wrong or odd):
            fault, detail = (wrong, about) if wrong else (odd, f"{row.get(str(self.label_column))!r}"[:300])
        return Record(
            key=f"{number:09d}" if key in (None, "") else str(key),
            image=image,
            captions=captions,
            label=label,
            meta=meta,
            fault=fault,
            detail=detail,
            place=place,
            name=(path_of(row.get(str(self.image_column))) or place) if key in (None, "") else None,
        )

    def _captions(self, row: Mapping[str, Any]) -> tuple[tuple[str, ...], str | None, str | None]:
        main = row.get(self.caption_column) if self.caption_column else None
        return captions_of(main, None if self.caption_column == "captions" else row.get("captions"))

    def _label(self, file: int, row: Mapping[str, Any]) -> tuple[str | None, str | None]:
        if self.label_column is None:
            return None, None
        value = row.get(self.label_column)
        if not self._label_named and isinstance(value, list | dict):
            return None, None  # the column is a guess, and not the one that was meant
        return label_of(value, self._class_names(file).get(self.label_column))

    def _meta(self, file: int, row: Mapping[str, Any]) -> dict[str, Any]:
        plain = {k: v for k, v in row.items() if k not in self._used and isinstance(v, str | int | float)}
        names = self._class_names(file)
        if names:
            named = {k: label_of(v, names[k])[0] for k, v in plain.items() if k in names}
            plain = {k: v for k, v in {**plain, **named}.items() if v is not None}
        return {k: v for k, v in plain.items() if not (isinstance(v, float) and not math.isfinite(v))}

    # ---- rows with the same image

    def _grouping(self) -> bool:
        if self.group is None:
            captioned = self.caption_column is not None or "captions" in self.columns
            return captioned and self._has_paths()
        return self.group

    def _text_columns(self) -> list[str]:
        wanted = (self.image_column, self.caption_column, self.label_column, "captions")
        return [column for column in dict.fromkeys(wanted) if column in self.columns]

    def _read_layout(self) -> Layout:
        self._lists = 0
        ids: list[np.ndarray] = []
        starts, lines = [], []
        for file in range(len(self.files)):
            found = array("q")
            folder = str(self.files[file].parent.absolute())

            def note(row: Mapping[str, Any], found: array[int] = found, folder: str = folder) -> None:
                name = image_name(folder, row.get(str(self.image_column)))
                # a row with a caption that cannot be read is not hidden in another record: it is counted
                found.append((hash(name) or 1) if name is not None and self._captions(row)[1] is None else 0)
                self._lists += is_listed(row.get(str(self.caption_column)))

            file_starts, file_lines = self._places(file, note if self._grouping() else None)
            starts.append(file_starts)
            lines.append(file_lines)
            ids.append(np.array(found, np.int64))
        layout = Layout(starts, lines)
        if not self._grouping():
            first = itertools.islice(self._rows(Segment(0, 0, SAMPLE), self._text_columns()[1:]), SAMPLE)
            self._lists = sum(is_listed(row.get(str(self.caption_column))) for _, row in first)
        elif (roles := roles_of(np.concatenate(ids))) is not None:
            layout.roles = roles[0]
            layout.more = self._read_apart(*roles)
        return layout

    def _read_apart(self, roles: np.ndarray, leaders: np.ndarray) -> Any:
        """Captions and labels of the rows that are not directly after their record, by the row of the record."""
        more: dict[int, tuple[list[str], list[str]]] = {}
        row_number = 0
        for file in range(len(self.files)):
            for _, row in self._rows(Segment(file, 0, sys.maxsize), self._text_columns()):
                if roles[row_number] == APART:
                    self._add_texts(file, row, *more.setdefault(int(leaders[row_number]), ([], [])))
                row_number += 1
        return merge_more(more)

    def _add_texts(self, file: int, row: Mapping[str, Any], captions: list[str], labels: list[str]) -> None:
        captions += self._captions(row)[0]
        label, fault = self._label(file, row)
        if label is not None or fault:
            labels.append(label if label is not None else str(fault))

    def __getstate__(self) -> dict[str, Any]:
        # other processes read parts, which hold what they need
        return {**self.__dict__, "_known": None, "_readers": {}}

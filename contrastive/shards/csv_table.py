"""CSV and TSV files, read strictly: a row that does not fit the header is an error with its line."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from contrastive.errors import UserError
from contrastive.shards.record import IMAGE_EXTENSIONS
from contrastive.shards.table_images import is_base64_image
from contrastive.shards.tables import CAPTION_NAMES, IMAGE_NAMES, LABEL_NAMES
from contrastive.shards.text_lines import Lines
from contrastive.shards.text_tables import Placed, TextSource
from contrastive.wording import one_line, short

ROW_LINES = 200  # of a row of a CSV file, at most; captions may have line breaks
SEPARATORS = "\t,;|"
NAMES = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a vertical bar"}
LARGEST_FIELD = 1 << 26  # characters; the default of 128 KiB is too few for a caption, and for base64
HEADER = "the first line was taken for the header"


class CsvSource(TextSource):
    """CSV or TSV with a header line.

    Each file has its own separator, the one that divides its header into columns. With tabs and vertical bars, quotes
    are text where no cell of the file is enclosed in them.
    """

    kind = "csv"

    def __init__(
        self,
        files: list[Path],
        image: str | None,
        caption: str | None,
        label: str | None,
        group: bool | None = None,
    ) -> None:
        csv.field_size_limit(LARGEST_FIELD)
        self.separators: dict[int, str] = {}
        self._starts: dict[int, tuple[int, int]] = {}  # of the first row after the header: byte and line
        self._plain: dict[int, bool] = {}  # whether quotes are text
        named = [name for name in (image, caption, label) if name is not None]
        self._wanted = {name.lower() for name in [*named, *IMAGE_NAMES, *CAPTION_NAMES, *LABEL_NAMES]}
        with open(files[0], "rb") as file:
            shown = file.readline(300).decode("utf-8", "replace").strip()
        self.begins = f" ({HEADER}: '{shown[:80]}'; add a line with the names of the columns, such as image,caption)"
        super().__init__(files, image, caption, label, group)

    def _read_columns(self, file: int) -> list[str]:
        path = self.files[file]
        lines = Lines(path)
        header = next((line for line in lines if line.strip()), "").rstrip("\r\n")
        declared = re.fullmatch(r'"?sep=(.)"?', header)  # as Excel writes it above the header
        if declared:
            header = next(lines, "").rstrip("\r\n")
        if not header.strip():
            raise UserError(f"{path}: empty; the first line must name the columns")
        if lines.bad:
            raise UserError(f"{path}: line {lines.number} with the names of the columns is not UTF-8; save it as UTF-8")
        self._starts[file] = lines.at, lines.number + 1
        self.separators[file] = declared[1] if declared else self._separator(path, header)
        names = [name.strip() for name in _fields(header, self.separators[file])]
        twice = next((name for name, count in Counter(names).items() if count > 1 and name), None)
        data = next((name for name in names if _is_data(path, name)), None)
        if data is not None:
            line = f"'{header[:80]}'"
            raise UserError(f"{path}: {HEADER}, and it holds data: {line}; add a line with the names of the columns")
        if twice is not None:
            raise UserError(f"{path}: line {lines.number}: two columns are named '{twice}'; rename one of them")
        return names

    def _separator(self, path: Path, header: str) -> str:
        divided = {mark: [name.strip() for name in _fields(header, mark)] for mark in SEPARATORS}
        several = {mark: names for mark, names in divided.items() if len(names) > 1}
        if not several:
            return "\t" if path.suffix.lower() == ".tsv" else ","
        known = {mark: sum(name.lower() in self._wanted for name in names) for mark, names in several.items()}
        best = [mark for mark in several if known[mark] == max(known.values())]
        if len(best) > 1:
            choices = " or ".join(NAMES[mark] for mark in best)
            raise UserError(
                f"{path}: the separator may be {choices}, by the first line '{header[:80]}'; put names that hold one "
                "into double quotes"
            )
        return best[0]

    def _placed(self, lines: Lines, file: int) -> Iterator[Placed]:
        if lines.at == 0:
            at, line = self._starts[file]
            lines.skip(at, line)
        header = self.headers[file]
        named = [(number, name) for number, name in enumerate(header) if name]
        whole = len(named) == len(header)
        rows = self._plain_rows(lines, file) if self._quotes_are_text(file) else self._quoted_rows(lines, file)
        for at, line, cells in rows:
            yield at, line, dict(zip(header, cells, strict=True)) if whole else {n: cells[i] for i, n in named}

    def _quoted_rows(self, lines: Lines, file: int) -> Iterator[tuple[int, int, list[str]]]:
        raw: list[str] = []  # the lines of one row
        at, line = lines.at, lines.number + 1
        separator, width = self.separators[file], len(self.headers[file])

        def noted() -> Iterator[str]:
            for text in lines:
                raw.append(text)
                if len(raw) > ROW_LINES:
                    raise _not_closed(lines.path, line, len(raw))
                yield text

        try:
            for cells in csv.reader(noted(), delimiter=separator, strict=True):
                if len(cells) != width:
                    if not any("".join(raw).strip() for _ in cells[:1]):
                        cells = []
                    else:
                        raise self._wrong_width(lines.path, line, len(cells), file)
                if len(raw) > 1 and self._holds_rows(raw, cells, file):
                    raise _not_closed(lines.path, line, len(raw))
                if cells:
                    yield at, line, cells
                raw.clear()
                at, line = lines.at, lines.number + 1
        except csv.Error as fault:
            if "unexpected end" in str(fault) or len(raw) > 1:
                raise _not_closed(lines.path, line, len(raw)) from None
            what = "text after a closing quote" if "expected after" in str(fault) else one_line(fault)
            raise UserError(
                f"{lines.path}: line {line}: {what}; enclose the whole cell in double quotes, and double those inside"
            ) from None

    def _plain_rows(self, lines: Lines, file: int) -> Iterator[tuple[int, int, list[str]]]:
        separator, width = self.separators[file], len(self.headers[file])
        at = lines.at
        for text in lines:
            cells = text.rstrip("\r\n").split(separator)
            if len(cells) == width:
                yield at, lines.number, cells
            elif text.strip():
                raise self._wrong_width(lines.path, lines.number, len(cells), file)
            at = lines.at

    def _wrong_width(self, path: Path, line: int, found: int, file: int) -> UserError:
        separator, columns = self.separators[file], self.headers[file]
        if found > len(columns):
            remedy = f"put cells that hold {NAMES.get(separator, separator)} into double quotes"
            remedy += ", or separate by tabs (.tsv)" if separator != "\t" else ""
        else:
            remedy = f"every row needs {len(columns) - 1} × {NAMES.get(separator, separator)}"
        counts = (
            f"{found} field{'s' * (found != 1)}, but the header names {len(columns)} column{'s' * (len(columns) != 1)}"
        )
        return UserError(f"{path}: line {line} has {counts} ({', '.join(map(short, columns))}); {remedy}")

    def _holds_rows(self, raw: list[str], cells: list[str], file: int) -> bool:
        """Whether more than one line of a row names an image in the place of that column."""
        header = self.headers[file]
        column = getattr(self, "image_column", None)
        if column not in header or not cells:
            return False
        place, width = header.index(column), len(header)
        folder = cells[place].strip().rpartition("/")[0]
        found = 0
        for text in raw:
            pieces = [piece.strip().strip('"') for piece in text.rstrip("\r\n").split(self.separators[file])]
            if len(pieces) >= width:
                found += _names_image(pieces[place], folder) or _names_image(pieces[place - width], folder)
        return found > 1

    def _quotes_are_text(self, file: int) -> bool:
        """Whether quotes in the cells of a file are part of the text, found by reading all of it."""
        if self.separators[file] not in "\t|":
            return False
        if file not in self._plain:
            self._plain[file] = _has_quote(self.files[file]) and self._is_plain(file)
        return self._plain[file]

    def _is_plain(self, file: int) -> bool:
        path, start = self.files[file], self._starts[file]
        try:
            for _ in self._quoted_rows(Lines(path, *start), file):
                pass
            return False
        except UserError as strict:
            try:
                for _, _, cells in self._plain_rows(Lines(path, *start), file):
                    if any(len(cell) > 1 and cell[0] == cell[-1] == '"' for cell in cells):
                        raise strict  # some cells are enclosed: what the quotes of the others mean is not clear
            except UserError:
                raise strict from None
            return True

    @property
    def notes(self) -> list[str]:
        found = super().notes
        return [
            *found,
            *(f"{self.files[file]}: quotes are read as text" for file, plain in self._plain.items() if plain),
        ]


def _fields(header: str, separator: str) -> list[str]:
    try:
        return next(csv.reader([header], delimiter=separator, strict=True))
    except (csv.Error, StopIteration):
        return header.split(separator)


def _is_data(path: Path, name: str) -> bool:
    """Whether what should be the name of a column looks like an image, or is one."""
    if name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS and "." in name:
        return True
    if "://" in name or name.startswith("data:") or len(name) > 200 or is_base64_image(name):
        return True
    return "/" in name and (path.parent / name).is_file()


def _names_image(text: str, folder: str) -> bool:
    """Whether text is the path of an image, not a sentence that ends with one."""
    start, dot, extension = text.rpartition(".")
    if not dot or extension.lower() not in IMAGE_EXTENSIONS:
        return False
    return not re.search(r"\s", start) or (folder != "" and text.rpartition("/")[0] == folder)


def _has_quote(path: Path) -> bool:
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            if b'"' in block:
                return True
    return False


def _not_closed(path: Path, line: int, lines: int) -> UserError:
    over = f"goes over {lines:,} lines: " if lines > 1 else ""
    return UserError(
        f"{path}: the row from line {line} on {over}{'' if over else 'has '}a quote {'is' if over else 'that is'} not "
        "closed; close it, or enclose the cell in double quotes and double the quotes that belong to the text"
    )

"""The lines of a text file, with the place of each."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import BinaryIO

from contrastive.errors import UserError

BYTE_ORDER_MARKS = {
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


class Lines:
    """The lines of a UTF-8 file from a byte offset on, with their ends.

    at: the offset after the last line given. number: its number, from 1. bad: numbers of lines that are not UTF-8;
    their odd bytes become half surrogates, as in Python's file names, so that the cells that hold them are found.
    """

    def __init__(self, path: Path, at: int = 0, line: int = 1) -> None:
        self.path, self.at, self.number = path, at, line - 1
        self.bad: list[int] = []
        self._file: BinaryIO = open(path, "rb")
        if at == 0:
            mark = self._file.read(4)
            encoding = next((name for start, name in BYTE_ORDER_MARKS.items() if mark.startswith(start)), None)
            if encoding:
                raise UserError(f"{path}: is {encoding}; save it as UTF-8")
        self._file.seek(at)
        self._waiting: list[bytes] = []

    def skip(self, at: int, line: int) -> None:
        """Go on at byte `at`, where line `line` begins."""
        self._file.seek(at)
        self._waiting, self.at, self.number = [], at, line - 1

    def __iter__(self) -> Lines:
        return self

    def __next__(self) -> str:
        if self._waiting:
            piece = self._waiting.pop()
        else:
            piece = self._file.readline()
            if not piece:
                self._file.close()
                self._file = io.BytesIO()  # at its end too
                raise StopIteration
            if b"\r" in piece and piece.count(b"\r") > (piece[-2:] == b"\r\n"):
                # a carriage return alone ends a line too, as in Python's text files
                self._waiting = [part for part in re.split(rb"(?<=\r)(?!\n)", piece) if part][::-1]
                piece = self._waiting.pop()
        encoding = "utf-8" if self.at else "utf-8-sig"
        self.at += len(piece)
        self.number += 1
        if b"\0" in piece:
            raise UserError(f"{self.path}: line {self.number} holds a NUL byte; save the file as UTF-8 text")
        try:
            return piece.decode(encoding)
        except UnicodeDecodeError:
            self.bad.append(self.number)
            return piece.decode(encoding, "surrogateescape")

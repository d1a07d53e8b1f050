"""File names as text that every output can hold."""

from __future__ import annotations

import re

_ESCAPED = re.compile(r"\\x[0-9a-f]{2}|\\u[0-9a-f]{4}")
_LONE = re.compile("[\ud800-\udfff]")


def printable(text: str) -> str:
    r"""A name as valid Unicode: bytes that are not UTF-8 become \xNN, as in caf\xe9.png.

    Different names stay different: where a name holds such an escape already, its backslashes are doubled.
    """
    if text.isascii() and "\\" not in text:
        return text
    if not _LONE.search(text) and not _ESCAPED.search(text):
        return text
    return _LONE.sub(_escape, text.replace("\\", "\\\\"))


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"

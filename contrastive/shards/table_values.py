"""Captions and labels as the cells of tables hold them."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Sequence
from typing import Any

# Labels that a program wrote for a missing one. They are never the name of a class.
MISSING_LABELS = frozenset({"", "nan", "NaN", "NAN", "None", "null", "NULL", "<NA>", "NaT"})
BAD_LIST = "caption is a list written as text that cannot be read"
_LISTED = re.compile(r"""\s*\[\s*["'].*["']\s*\]\s*""", re.DOTALL)


def captions_of(main: Any, more: Any = None) -> tuple[tuple[str, ...], str | None, str | None]:
    """The captions of a row without repetitions, in order; why it has none, and the value that this is about.

    main: the caption column: text, a list of texts, or such a list written as text (JSON, or Python's own form).
    more: the column `captions`, which adds to it. It is passed over if it holds something else and `main` has a text.
    """
    if type(main) is str and more is None and main.isascii() and not main.lstrip().startswith("["):
        text = main.strip()
        return ((text,) if text else ()), None, None
    texts, fault = _texts(main)
    if fault:
        return (), fault, f"{main!r}"[:300]
    if more is not None:
        others, fault = _texts(more)
        if fault and not texts:
            return (), fault, f"{more!r}"[:300]
        texts += others
    return tuple(dict.fromkeys(texts)), None, None


def _texts(value: Any) -> tuple[list[str], str | None]:
    if isinstance(value, str):
        if is_listed(value):
            found = _listed(value)
            return ([], BAD_LIST) if found is None else ([text for text in map(str.strip, found) if text], None)
        if not is_utf8(value):
            return [], "caption not UTF-8"
        return ([value.strip()] if value.strip() else []), None
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return [], None
    if isinstance(value, bytes):
        try:
            return _texts(value.decode())
        except UnicodeDecodeError:
            return [], "caption not UTF-8"
    if isinstance(value, list):
        texts: list[str] = []
        for one in value:
            if isinstance(one, list):
                return [], "caption is a list of lists"
            found, fault = _texts(one)
            if fault:
                return [], fault
            texts += found
        return texts, None
    return [], "caption is an object, not text" if isinstance(value, dict) else "caption is a number, not text"


def is_utf8(value: Any) -> bool:
    """Whether a cell is no text with odd bytes, see `Lines`, or half of a surrogate pair, as JSON can spell one."""
    if not isinstance(value, str) or value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_listed(value: Any) -> bool:
    """Whether a cell is text that looks like a list of texts: '["a cat", "a dog"]'."""
    return isinstance(value, str) and value.lstrip()[:1] == "[" and _LISTED.fullmatch(value) is not None


def _listed(text: str) -> list[str] | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        try:
            found = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return None
        if str(found) != text.strip():  # ['a' 'b'], as NumPy writes it, would become one text
            return None
    return found if isinstance(found, list) and all(isinstance(one, str) for one in found) else None


def label_of(value: Any, names: Sequence[str] | None = None) -> tuple[str | None, str | None]:
    """The class name of a cell, None if it has none; and why the cell cannot be used.

    names: of the classes, where the file has them; then a cell holds the number of one, and -1 is no label.
    """
    if value is None:
        return None, None
    if isinstance(value, float):
        if math.isnan(value):
            return None, None
        value = int(value) if value.is_integer() else value  # whole numbers of a column with gaps: 3.0
    if names is not None and isinstance(value, int):
        if value == -1:
            return None, None
        return (names[value], None) if 0 <= value < len(names) else (None, "label is not the number of a class")
    if isinstance(value, bytes):
        value = value.decode("utf-8", "surrogateescape")
    if isinstance(value, list | dict):
        return None, "label is a list or an object, not a name"
    text = str(value).strip()
    if not is_utf8(text):
        return None, "label not UTF-8"
    return (None if text in MISSING_LABELS else text), None

"""JSON objects without repeated keys: Python's reader keeps the last value of a key and drops the others."""

from __future__ import annotations

from typing import Any


class RepeatedKey(Exception):
    """An object gives two values to one key, which is the text of this error."""


def strict_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object, for `json.loads(..., object_pairs_hook=strict_object)`. Raises RepeatedKey."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise RepeatedKey(next(key for key in keys if keys.count(key) > 1))
    return found

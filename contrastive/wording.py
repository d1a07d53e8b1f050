"""Parts of the one-line messages that commands print."""

from __future__ import annotations

from collections.abc import Iterable


def one_line(fault: BaseException) -> str:
    """The first line of an error's text; the name of its type where it has no text."""
    return next(iter(str(fault).strip().splitlines()), type(fault).__name__)


def first_few(names: Iterable[object], most: int = 5) -> str:
    """Names with commas between them, at most `most`, and the number of the others: "a, b and 3 more"."""
    every = [str(name) for name in names]
    more = f" and {len(every) - most:,} more" if len(every) > most else ""
    return ", ".join(every[:most]) + more


def short(name: str, most: int = 40) -> str:
    """A name of at most `most` characters; the end of a longer one is "…"."""
    return name if len(name) <= most else f"{name[:most]}…"


def counted(count: int, one: str, many: str | None = None) -> str:
    """A count and its noun: "1 image", "2,000 images". many: the plural where it is not `one` with an s."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def a_type(value: object) -> str:
    """The type of a value with its article: "a list", "an int"."""
    name = type(value).__name__
    return f"{'an' if name[:1].lower() in 'aeio' else 'a'} {name}"


def plain_repr(value: object) -> str:
    """The `repr` of a value, of NumPy's scalars that of the plain value: 'cat' and not np.str_('cat')."""
    item = getattr(value, "item", None)
    return repr(item() if type(value).__module__ == "numpy" and getattr(value, "shape", None) == () and item else value)

"""Tells whoever wants to know when a loss waits for other ranks.

The training loop counts that time as communication; a loss need not know the loop. Collectives of this room go inside
``with exchanging():``, and so should those of a loss of your own.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

_around: Callable[[], AbstractContextManager[None]] = nullcontext


def exchanging() -> AbstractContextManager[None]:
    """What goes around a collective, or around the wait for one that was started earlier."""
    return _around()


@contextmanager
def watch_exchanges(around: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Inside this block every exchange of a loss, in this process, happens inside ``around()``."""
    global _around
    before, _around = _around, around
    try:
        yield
    finally:
        _around = before

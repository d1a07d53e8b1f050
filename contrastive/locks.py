"""One process at a time: a lock on a file or a folder, which the system frees when its process ends in any way."""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# Errors of file systems without locks (some network and user-space ones).
NO_LOCKS = {getattr(errno, name) for name in ("ENOLCK", "ENOTSUP", "EOPNOTSUPP", "ENOSYS", "EINVAL", "EBADF")}
TRIES = 100  # a lock file that its holder removes between our open and our lock is opened again

_held: set[int] = set()  # descriptors of this process's locks


def _let_go_in_child() -> None:
    """Close the locks in a forked child: else a loader's worker that outlives its parent holds the parent's lock."""
    for handle in _held:
        with suppress(OSError):
            os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)


class Busy(Exception):  # noqa: N818 - a state, which the caller puts into words
    """Another process holds the lock. The text names it where it is known: "process 12 on host a, since …"."""


@contextmanager
def only_one(path: Path, say: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold the lock of `path` during the block; never wait for it.

    Args:
        path: a folder that exists; or a file, which is made, names this process, and is deleted after the block.
        say: takes one line where the file system has no locks; the block runs all the same. None prints it.

    Raises:
        Busy: another process holds it, or a folder has been renamed by the process that held it.
        OSError: the file cannot be made.
    """
    handle = _locked(path, say or _note)
    is_file = not path.is_dir()
    try:
        if is_file:
            _sign(handle)
        yield
    finally:
        if handle in _held:  # not in a child that was forked in the block
            if is_file and _is(handle, path):
                path.unlink(missing_ok=True)  # while the lock is held: nobody else's can be there
            _held.discard(handle)
            os.close(handle)


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _locked(path: Path, say: Callable[[str], None]) -> int:
    """An open descriptor of `path` that holds its lock."""
    is_folder = path.is_dir()
    flags = os.O_RDONLY if is_folder else os.O_RDWR | os.O_CREAT  # NFS locks only what is open for writing
    for _ in range(TRIES):
        try:
            handle = os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) * (not is_folder), 0o644)
        except FileNotFoundError:  # a folder that was just finished by another process, and renamed
            raise Busy("another process") from None
        taken = False
        try:
            if _lock(handle, path, say) and not _is(handle, path):
                if is_folder:
                    raise Busy("another process")
                continue
            _held.add(handle)
            taken = True
            return handle
        except BlockingIOError:
            raise Busy(_holder(handle) if not is_folder else "another process") from None
        finally:
            if not taken:
                os.close(handle)
    raise Busy("another process")


def _lock(handle: int, path: Path, say: Callable[[str], None]) -> bool:
    """Whether the file system has locks; raises BlockingIOError where another process holds this one."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as fault:
        if fault.errno not in NO_LOCKS:
            raise
        say(
            f"note: the file system of {path.parent} has no locks ({os.strerror(fault.errno or 0)}); nothing keeps a "
            "second process from writing to the same folder"
        )
        return False
    return True


def _is(handle: int, path: Path) -> bool:
    """Whether `path` is still the file that was opened."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except OSError:
        return False


def _sign(handle: int) -> None:
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    entry = json.dumps({"process": os.getpid(), "host": socket.gethostname(), "since": now})
    with suppress(OSError):  # a full disk: the lock holds without a name
        os.ftruncate(handle, 0)
        os.pwrite(handle, entry.encode(), 0)


def _holder(handle: int) -> str:
    """The process that signed the lock file."""
    try:
        entry = json.loads(os.pread(handle, 4096, 0))
        return f"process {int(entry['process'])} on host {entry['host']}, since {entry['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"

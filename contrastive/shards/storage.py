"""Where the bytes of a shard lie: a local file, or a copy of what a store holds.

The cache of copies is a folder that any number of processes fill at once. Of each shard it holds NAME.tar; NAME.json,
which says what NAME.tar must be; NAME.lock, held by the process that fetches it, and by the kernel's grace not by a
dead one; and NAME.partial while it is fetched, which becomes NAME.tar when it is whole.
"""

import fcntl
import glob
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from contrastive.errors import UserError
from contrastive.shards.download import Fault, Remote, ask, configure, identity, pause, redact, remote_settings
from contrastive.shards.record import Rejected
from contrastive.shards.transfer import DISK_FULL

__all__ = [
    "Remote",
    "ShardUnavailable",
    "configure",
    "expand",
    "index_folder",
    "is_remote",
    "local_path",
    "redact",
    "remote_settings",
    "shard_stat",
]

ASK_AGAIN_SECONDS = 300.0  # a shard that failed is not asked for again sooner: each of its samples would wait
IN_USE_SECONDS = 60.0  # a copy handed out less long ago is not evicted: somebody may be about to open it
MAX_SHARDS = 1_000_000  # of one brace pattern

Shard = str | os.PathLike[str]


class ShardUnavailable(Rejected):
    """A shard could not be downloaded. Its text, unlike its reason, names the shard, the cause and the remedy."""

    def __init__(self, detail: str) -> None:
        super().__init__("shard unavailable", detail)

    def __str__(self) -> str:
        return self.detail or self.reason

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardUnavailable, (self.detail,)


def is_remote(shard: Shard) -> bool:
    """Whether a shard is a URL (or a `pipe:` command) and no local path; `file://` is local."""
    text = os.fspath(shard)
    return text.startswith("pipe:") or (re.match(r"[A-Za-z][\w+.-]*://", text) is not None and not _is_file(text))


def local_path(shard: Shard) -> Path:
    """A local file that holds the bytes of `shard`: itself, or a whole copy in the cache, fetched at the first use.

    The copy's modification time is a function of its bytes, so that fetching it again changes nothing.

    Raises:
        ShardUnavailable: after all attempts, at the latest `Remote.deadline_seconds` later; at once within
            ASK_AGAIN_SECONDS of such a failure in this process.
        UserError: the store's driver is not installed; a `pipe:` without --allow-pipe.
    """
    text = os.fspath(shard)
    if not is_remote(text):
        return Path(_plain(text))
    settings = remote_settings()
    _check_pipe(text, settings)
    copy = _Copy(text, settings)
    if copy.whole():
        copy.touch()
        return copy.path
    failed = _failed.get(text)
    if failed is not None and time.monotonic() < failed[0]:
        raise failed[1]
    try:
        copy.fetch()
    except ShardUnavailable as unavailable:
        logging.getLogger(__name__).warning("%s", unavailable)
        _failed[text] = (time.monotonic() + ASK_AGAIN_SECONDS, unavailable)
        raise
    _evict(settings)
    return copy.path


def shard_stat(shard: Shard) -> tuple[int, int]:
    """Size in bytes and modification time in ns of a shard, also of one whose copy was evicted: it is not fetched.

    Raises as `local_path`, for a shard that was never fetched; FileNotFoundError for a local one that is not there.
    """
    if is_remote(shard):
        described = _Copy(os.fspath(shard), remote_settings()).described()
        if described is not None:
            size, mtime_ns = described["stat"]
            return size, mtime_ns
    found = local_path(shard).stat()
    return found.st_size, found.st_mtime_ns


_failed: dict[str, tuple[float, ShardUnavailable]] = {}


def expand(path: Shard) -> list[str]:
    """The shards that a path or URL stands for, sorted: braces ({00..12}, {a,b}), globs, folders, or itself.

    Raises UserError when it stands for nothing, or when the store cannot be asked.
    """
    text = os.fspath(path)
    remote = is_remote(text)
    patterns = [text] if not remote and os.path.exists(_plain(text)) else _braces(text)
    found = [shard for pattern in patterns for shard in (_list_remote(pattern) if remote else _list_local(pattern))]
    return sorted(found)


def index_folder(shards: Sequence[Shard]) -> Path:
    """A local folder to keep what belongs to a list of remote shards, the same for the same list.

    Called once a run with all shards, it also drops copies of shards that the store has replaced since, and lets
    shards that failed be asked for again. A store that does not answer is no reason to drop: the copies stay.
    """
    settings = remote_settings()
    remote = [os.fspath(shard) for shard in shards if is_remote(shard)]
    for url in remote:
        _failed.pop(url, None)
    _drop_replaced(remote, settings)
    names = []
    for shard in shards:
        names.append(identity(os.fspath(shard)) if is_remote(shard) else os.path.abspath(local_path(shard)))
    folder = settings.cache_dir / "index" / _digest("\0".join(names))
    with _disk(settings):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


class _Copy:
    """The place of one remote shard in the cache."""

    def __init__(self, shard: str, settings: Remote) -> None:
        self.shard, self.settings = shard, settings
        self.folder = settings.cache_dir / "shards"
        # the last part of the address, for whoever looks into the folder; the hash alone tells shards apart
        base = "pipe" if shard.startswith("pipe:") else identity(shard).split("?")[0].rpartition("/")[2]
        name = f"{_digest(identity(shard))}-{re.sub(r'[^A-Za-z0-9-]', '_', base.removesuffix('.tar'))[:60]}"
        self.path = self.folder / f"{name}.tar"
        self.sidecar, self.lock, self.partial = (self.folder / f"{name}.{kind}" for kind in ("json", "lock", "partial"))

    def whole(self) -> bool:
        """Whether the copy is there, and is what was fetched."""
        described = self.described()
        try:
            found = self.path.stat()
        except OSError:
            return False
        return described is not None and described["stat"] == [found.st_size, found.st_mtime_ns]

    def described(self) -> dict[str, Any] | None:
        """What the sidecar says; None where there is none, or none that can be read."""
        try:
            found = json.loads(self.sidecar.read_text())
            return found if isinstance(found, dict) and "stat" in found else None
        except (OSError, ValueError):
            return None

    def touch(self) -> None:
        """Note the use: the least recently used copy is the first to go."""
        try:
            os.utime(self.sidecar)
        except OSError:
            pass  # a cache that others own may be read

    def fetch(self) -> None:
        """Make the copy, or wait for the process that is making it. Raises ShardUnavailable or UserError."""
        deadline = time.monotonic() + self.settings.deadline_seconds
        with _disk(self.settings, ShardUnavailable):
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                if not _locked(lock, deadline):
                    raise ShardUnavailable(
                        f"{redact(self.shard)}: another process was still fetching it after "
                        f"{self.settings.deadline_seconds:g} s; see which holds {self.lock}"
                    )
                if not self.whole():
                    self._attempts(lock, deadline)
            finally:
                fcntl.flock(lock, fcntl.LOCK_UN)  # a loader's worker forked meanwhile has the file open too
                os.close(lock)

    def _attempts(self, lock: int, deadline: float) -> None:
        started, attempt = time.monotonic(), 0
        while True:
            attempt += 1
            try:
                self._attempt(lock, deadline)
                return
            except Fault as fault:
                if fault.kind == "driver":
                    raise UserError(str(fault)) from None
                if fault.kind == "disk":
                    raise ShardUnavailable(_full(self.settings, str(fault))) from None
                if fault.kind == "final" or attempt > self.settings.retries or time.monotonic() > deadline:
                    seconds = time.monotonic() - started
                    raise ShardUnavailable(
                        f"{redact(self.shard)}: {fault} (attempts: {attempt}, in {seconds:.1f} s); check that the "
                        "address is right, that this machine reaches it and that its credentials are set"
                    ) from None
                pause(self.settings, attempt, deadline)
            finally:
                self.partial.unlink(missing_ok=True)

    def _attempt(self, lock: int, deadline: float) -> None:
        self.partial.unlink(missing_ok=True)
        what = {"do": "copy", "url": self.shard}
        if self.shard.startswith("pipe:"):
            what = {"do": "pipe", "command": self.shard.removeprefix("pipe:")}
        request = {**what, "to": str(self.partial)}
        (described,) = ask(request, self.settings, deadline, growing=self.partial, held=lock)
        with open(self.partial, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if described["size"] not in (None, size):
                raise Fault(f"{size} bytes came, of {described['size']}", "again")
            mtime_ns = _content_time(file)
            os.utime(file.fileno(), ns=(mtime_ns, mtime_ns))
            os.fsync(file.fileno())
        os.replace(self.partial, self.path)
        stat = [size, mtime_ns]
        temporary = self.sidecar.with_suffix(".json.partial")
        temporary.write_text(json.dumps({"from": redact(self.shard), "stat": stat, "store": described}))
        os.replace(temporary, self.sidecar)  # after the copy: a sidecar without its copy, or with another, is no hit


def _content_time(file: Any) -> int:
    """A modification time in ns, between 2001 and 2017, that stands for the bytes of a file.

    An index tells by size and time whether a shard changed; the time of fetching would say so of the same bytes.
    In the past, as what is derived from a shard must be newer.
    """
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    number = int.from_bytes(digest.digest()[:8], "little")
    return (1_000_000_000 + number % 500_000_000) * 1_000_000_000 + number // 500_000_000 % 1_000_000_000


def _locked(lock: int, deadline: float) -> bool:
    """Take the lock; False when it is still held at the deadline."""
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)


@contextmanager
def _disk(settings: Remote, error: type[Exception] = UserError) -> Iterator[None]:
    """Faults of the cache's own disk name the folder and the remedy."""
    try:
        yield
    except OSError as fault:
        if fault.errno in DISK_FULL:
            raise error(_full(settings, os.strerror(fault.errno or 0))) from None
        raise error(
            f"{settings.cache_dir}: cannot keep shards there ({fault.strerror}); set CONTRASTIVE_CACHE to a folder "
            "that can be written"
        ) from None


def _full(settings: Remote, reason: str) -> str:
    return (
        f"{settings.cache_dir}: no room for a shard ({reason}); free some, set CONTRASTIVE_CACHE to another folder, or "
        "CONTRASTIVE_CACHE_BYTES to a limit"
    )


def _evict(settings: Remote) -> None:
    """Remove the least recently used copies while all together are above the limit, see IN_USE_SECONDS.

    A reader that has a removed copy open goes on reading it.
    """
    if settings.max_bytes is None:
        return
    copies = []
    for sidecar in (settings.cache_dir / "shards").glob("*.json"):
        try:
            copies.append((sidecar.stat().st_mtime, sidecar, sidecar.with_suffix(".tar").stat().st_size))
        except FileNotFoundError:
            continue  # another process was faster
    used = sum(size for _, _, size in copies)
    for last_use, sidecar, size in sorted(copies):
        if used <= settings.max_bytes or time.time() - last_use < IN_USE_SECONDS:
            return
        if _remove(sidecar, sidecar.with_suffix(".tar")):  # what it was stays known, see `shard_stat`
            used -= size


def _remove(sidecar: Path, *files: Path) -> bool:
    """Remove files of a copy, unless a process is fetching it."""
    try:
        lock = os.open(sidecar.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError:
        return False  # others own this cache
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for file in files:
            file.unlink(missing_ok=True)
        return True
    except OSError:
        return False
    finally:
        os.close(lock)


def _drop_replaced(shards: list[str], settings: Remote) -> None:
    """Remove the copies of which the store now says another size or version than when they were fetched."""
    copies = {shard: _Copy(shard, settings) for shard in shards if not shard.startswith("pipe:")}
    old = {shard: described for shard, copy in copies.items() if (described := copy.described()) is not None}
    if not old:
        return
    try:
        found = ask({"do": "stat", "urls": list(old)}, settings, time.monotonic() + settings.deadline_seconds)
    except Fault:
        return
    for now in found:
        before = old[now["url"]]["store"]
        if any(now[what] is not None and now[what] != before[what] for what in ("size", "version")):
            copy = copies[now["url"]]
            _remove(copy.sidecar, copy.sidecar, copy.path)


def _list_remote(pattern: str) -> list[str]:
    settings = remote_settings()
    _check_pipe(pattern, settings)
    place, _, query = pattern.partition("?") if pattern.startswith("http") else (pattern, "", "")
    if pattern.startswith("pipe:") or query or (place.endswith(".tar") and not re.search(r"[*?[]", place)):
        return [pattern]
    if not re.search(r"[*?[]", place):
        pattern = f"{place.rstrip('/')}/*.tar"
    deadline = time.monotonic() + settings.deadline_seconds
    for attempt in range(1, settings.retries + 2):
        try:
            (found,) = ask({"do": "list", "pattern": pattern}, settings, deadline)
            break
        except Fault as fault:
            if fault.kind == "driver":
                raise UserError(str(fault)) from None
            if fault.kind == "final" or attempt > settings.retries:
                raise UserError(
                    f"{redact(pattern)}: cannot be listed: {fault} (attempts: {attempt}); check the address and the "
                    "credentials, or name the shards, as in …/{00000..00012}.tar"
                ) from None
            pause(settings, attempt, deadline)
    if not found["urls"]:
        raise UserError(f"{redact(pattern)}: no shard there; a shard ends in .tar, as in …/{{00000..00012}}.tar")
    return list(found["urls"])


def _list_local(pattern: str) -> list[str]:
    path = _plain(pattern)
    if os.path.isdir(path):
        found = glob.glob(os.path.join(glob.escape(path), "*.tar"))
        if not found:
            raise UserError(f"{path}: no .tar shard in this folder; make them with `contrastive shard SOURCE {path}`")
        return found
    found = [path] if os.path.exists(path) else glob.glob(path)
    if not found:
        raise UserError(f"{path}: no such file or folder")
    return found


def _braces(text: str) -> list[str]:
    """What a shell makes of {00..12} and {a,b}; any other brace stays."""
    done: list[str] = []
    open_ = [text]
    while open_:
        now = open_.pop()
        match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", now)
        if match is None:
            done.append(now)
            continue
        first, last, names = match.groups()
        parts: Iterator[str]
        if names is None:
            width = max((len(number) for number in (first, last) if number[0] == "0" and number != "0"), default=0)
            numbers = range(int(first), int(last) + 1)
            if not numbers:
                raise UserError(f"{redact(text)}: the range {match[0]} is empty; give the smaller number first")
            parts = (f"{number:0{width}d}" for number in numbers)
            count = len(numbers)
        else:
            parts = iter(names.split(","))
            count = names.count(",") + 1
        if count + len(open_) + len(done) > MAX_SHARDS:
            raise UserError(f"{redact(text)}: stands for more than {MAX_SHARDS:,} shards")
        open_ += [now[: match.start()] + part + now[match.end() :] for part in parts]
    return sorted(set(done))


def _check_pipe(shard: str, settings: Remote) -> None:
    if shard.startswith("pipe:") and not settings.allow_pipe:
        raise UserError(
            f"{redact(shard)}: a pipe: shard runs a command on this machine; say --allow-pipe if you trust whoever "
            "wrote it, or give a path or URL"
        )


def _is_file(text: str) -> bool:
    return text.lower().startswith("file://")


def _plain(text: str) -> str:
    return text[len("file://") :] if _is_file(text) else text


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]

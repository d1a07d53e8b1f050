"""Asking a store for something: settings, patience with it, and errors that give no credentials away."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from contrastive.errors import UserError
from contrastive.shards import transfer

_VARIABLES = {
    "cache_dir": "CONTRASTIVE_CACHE",
    "max_bytes": "CONTRASTIVE_CACHE_BYTES",
    "retries": "CONTRASTIVE_REMOTE_RETRIES",
    "deadline_seconds": "CONTRASTIVE_REMOTE_DEADLINE",
    "stall_seconds": "CONTRASTIVE_REMOTE_STALL",
    "first_wait_seconds": "CONTRASTIVE_REMOTE_WAIT",
    "allow_pipe": "CONTRASTIVE_ALLOW_PIPE",
}


@dataclass(frozen=True)
class Remote:
    """How remote shards are fetched and kept.

    cache_dir: folder of the copies. max_bytes: of all copies together; None: no limit.
    retries: attempts after the first. first_wait_seconds: before the first of them, about twice as long before each
    further one. deadline_seconds: for one shard, all attempts and the wait for another process's together.
    stall_seconds: an attempt that gets no byte for so long has failed. allow_pipe: run the commands of `pipe:` shards.
    """

    cache_dir: Path
    max_bytes: int | None = None
    retries: int = 4
    deadline_seconds: float = 300.0
    stall_seconds: float = 20.0
    first_wait_seconds: float = 0.5
    allow_pipe: bool = False

    def __post_init__(self) -> None:
        for name in ("retries", "deadline_seconds", "stall_seconds", "first_wait_seconds", "max_bytes"):
            value = getattr(self, name)
            least = 0 if name in ("retries", "first_wait_seconds") else 1e-3
            if value is not None and not value >= least:
                raise UserError(f"{_VARIABLES[name]} {value}: give a number {'of' if least else 'above'} 0 or more")


def remote_settings() -> Remote:
    """The settings in force. They live in the environment, so that spawned and forked workers have them too.

    Raises UserError for a variable that is no number.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    found: dict[str, Any] = {"cache_dir": Path(home) / "contrastive"}
    for name, variable in _VARIABLES.items():
        text = os.environ.get(variable)
        if text:
            found[name] = _parse(name, variable, text)
    return Remote(**found)


def configure(**changes: Any) -> None:
    """Change settings for this process and those that it starts; names as in `Remote`.

    `allow_pipe` is for the command line alone: a recipe, which may be somebody else's, cannot set it.
    """
    wanted = replace(remote_settings(), **changes)
    for field in fields(wanted):
        if field.name in changes:
            value = getattr(wanted, field.name)
            text = "" if value is None or value is False else "1" if value is True else str(value)
            os.environ[_VARIABLES[field.name]] = text


def _parse(name: str, variable: str, text: str) -> Any:
    if name == "cache_dir":
        return Path(text).expanduser()
    if name == "allow_pipe":
        return text == "1"
    try:
        return int(text) if name in ("retries", "max_bytes") else float(text)
    except ValueError:
        raise UserError(f"{variable} {text}: give a number") from None


# Query parameters that sign a URL, and change from day to day while the file stays the same: those of S3 and Google
# always, those of older signatures and of Azure where the first of their kind is there.
_SIGNED = re.compile(r"x-(amz|goog)-.*")
_SIGNATURES = {
    "signature": {"signature", "expires", "policy", "key-pair-id", "awsaccesskeyid", "googleaccessid"},
    "sig": {"sig", "sv", "ss", "srt", "sp", "se", "st", "spr", "sr", "skoid", "sktid", "skt", "ske", "sks", "skv"},
}


def identity(shard: str) -> str:
    """What tells a remote shard from others: its URL without user, password and signature."""
    if shard.startswith("pipe:"):
        return shard
    if not shard.startswith(("http://", "https://")):
        return re.sub(r"(\w://)[^/]*@", r"\1", shard)  # in the name of an object, ? and # are letters
    parts = urlsplit(shard)
    query = parse_qsl(parts.query, keep_blank_values=True)
    names = {name.lower() for name, _ in query}
    signature = set().union(*(group for first, group in _SIGNATURES.items() if first in names))
    kept = [(k, v) for k, v in query if not (_SIGNED.fullmatch(k.lower()) or k.lower() in signature)]
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}" + (f"?{urlencode(kept)}" if kept else "")


def redact(text: str) -> str:
    """A text fit for a log: URLs in it lose user, password and query; of a pipe only the program is named."""
    if text.startswith("pipe:"):
        program = text.removeprefix("pipe:").split(maxsplit=1)
        return f"pipe:{redact(program[0]) if program else ''} …"
    text = re.sub(r"(\w://)[^\s/'\"]*@", r"\1", text)
    return re.sub(r"(\w://[^\s?#'\"]*)[?#][^\s'\"),]*", r"\1", text)


class Fault(Exception):
    """An attempt failed: why, and whether another may succeed ("again"), see `transfer`."""

    def __init__(self, text: str, kind: str) -> None:
        super().__init__(redact(text))
        self.kind = kind


def ask(
    request: dict[str, Any], settings: Remote, deadline: float, *, growing: Path | None = None, held: int | None = None
) -> list[dict[str, Any]]:
    """The answers of one process of `transfer`, which is killed when it hangs.

    deadline: of `time.monotonic`. growing: the file that its bytes go to; its own answers where None.
    held: an open file that the process holds too, and so the lock on it, should this process be killed.
    Raises Fault.
    """
    with tempfile.TemporaryFile() as answers:
        process = subprocess.Popen(
            [sys.executable, transfer.__file__],
            stdin=subprocess.PIPE,
            stdout=answers,
            stderr=subprocess.DEVNULL,
            pass_fds=() if held is None else (held,),
            start_new_session=True,  # Ctrl-C is for us to answer
        )
        try:
            assert process.stdin is not None
            process.stdin.write(json.dumps({"stall": settings.stall_seconds, **request}).encode() + b"\n")
            process.stdin.flush()
            _watch(process, answers.fileno() if growing is None else growing, settings.stall_seconds, deadline)
        except BrokenPipeError:
            pass  # it is gone: the lack of an answer says so
        finally:
            _kill(process)
        answers.seek(0)
        found = [json.loads(line) for line in answers if line.endswith(b"\n")]
    for line in found:
        if "error" in line:
            raise Fault(line["error"], line["kind"])
    if not found and request["do"] != "stat":
        raise Fault(f"the process that fetches ended with exit code {process.returncode}", "again")
    return found


def _watch(process: subprocess.Popen[bytes], growing: int | Path, stall: float, deadline: float) -> None:
    size, grown, wait = -1, time.monotonic(), 0.005
    while process.poll() is None:
        now = time.monotonic()
        try:
            seen = os.stat(growing).st_size
        except FileNotFoundError:
            seen = -1
        if seen != size:
            size, grown = seen, now
        if now > deadline:
            raise Fault("the deadline passed", "final")
        if now - grown > stall:
            raise Fault(f"no byte for {stall:g} s", "again")
        time.sleep(min(wait, 0.1))
        wait *= 1.5


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the process and the command that it may have started; harmless where they have ended."""
    if process.poll() is None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.wait()
    if process.stdin is not None:
        try:
            process.stdin.close()
        except BrokenPipeError:
            pass


def pause(settings: Remote, attempt: int, deadline: float) -> None:
    """Wait before attempt number `attempt` (from 1): longer each time, and never all processes at once."""
    wait = min(settings.first_wait_seconds * 2 ** (attempt - 1), 30.0)
    wait *= random.SystemRandom().uniform(0.5, 1.5)  # not the run's random stream, which workers share by fork
    time.sleep(max(0.0, min(wait, deadline - time.monotonic())))

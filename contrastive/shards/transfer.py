"""The program that talks to a store: run as a process of its own, given one request, and killed when it hangs.

fsspec's drivers keep event loops in threads, which do not survive the fork of a loader's worker, and each driver has
its own idea of a timeout. A fresh process has neither problem: whoever started it watches the bytes arrive and the
clock. It imports the standard library only, and fsspec when a store is asked, so that it starts in a tenth of a second.

The request is one line of JSON on standard input, the answers are lines of JSON on standard output:
  {"do": "copy", "url": …, "to": path}  →  {"size": bytes or null, "version": text or null}, the store's own words
  {"do": "list", "pattern": …}          →  {"urls": […]}
  {"do": "stat", "urls": […]}           →  a line {"url": …, "size": …, "version": …} for each that answers
  {"do": "pipe", "command": …, "to": path}  →  {"size": null, "version": null}
or {"error": text, "kind": "again" | "final" | "driver" | "disk"}.
"""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub", "http": "aiohttp"}
_PACKAGES |= {"s3a": "s3fs", "https": "aiohttp", "az": "adlfs", "abfs": "adlfs"}
_VERSIONS = ("ETag", "etag", "md5Hash", "sha256", "blob_id", "Last-Modified", "LastModified", "updated", "mtime")


def answer(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The answers to a request, see the top of this file."""
    match request["do"]:
        case "copy":
            store, path = _open(request["url"], request["stall"])
            described = _describe(store, path)
            store.get_file(path, request["to"])
            yield described
        case "list":
            store, path = _open(request["pattern"], request["stall"])
            yield {"urls": sorted(store.unstrip_protocol(name) for name in store.glob(path))}
        case "stat":
            with ThreadPoolExecutor(16) as pool:
                for found in pool.map(lambda url: _stat(url, request["stall"]), request["urls"]):
                    if found is not None:
                        yield found
        case "pipe":
            with open(request["to"], "wb") as file:
                code = subprocess.run(request["command"], shell=True, stdin=subprocess.DEVNULL, stdout=file).returncode
            if code:
                raise OSError(f"the command ended with exit code {code}")
            yield {"size": None, "version": None}


def _open(url: str, stall: float) -> tuple[Any, str]:
    import fsspec

    options: dict[str, Any] = {}
    if url.startswith(("http://", "https://")):
        import aiohttp

        # The default is five minutes for a whole file, which a large shard may well need.
        options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=stall, sock_read=stall)}
    return fsspec.core.url_to_fs(url, **options)


def _describe(store: Any, path: str) -> dict[str, Any]:
    found = store.info(path)
    version = next((str(found[name]) for name in _VERSIONS if found.get(name)), None)
    return {"size": found.get("size"), "version": version}


def _stat(url: str, stall: float) -> dict[str, Any] | None:
    try:
        return {"url": url, **_describe(*_open(url, stall))}
    except Exception:  # whatever the driver raises: the caller keeps what it has
        return None


def fault(error: BaseException, url: str) -> dict[str, str]:
    """What went wrong, and whether to ask again: a code of 408, 429 or 500 and above, and whatever has no code."""
    if isinstance(error, ImportError) or (isinstance(error, ValueError) and "rotocol" in str(error)):
        scheme = url.split("://")[0]
        package = "fsspec" if getattr(error, "name", "") == "fsspec" else _PACKAGES.get(scheme)
        if package is None:
            return {"error": f"fsspec knows no driver for {scheme}:// ({error})", "kind": "driver"}
        way = f"pip install {package}" if package in _PACKAGES.values() else "pip install 'contrastive[remote]'"
        if package == "aiohttp":
            way = "pip install 'contrastive[remote]'"
        return {"error": f"{scheme}:// needs the package {package}; {way}", "kind": "driver"}
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    code = next(filter(None, map(_status, chain)), None)
    if code is not None:
        again = code >= 500 or code in (408, 429)
        return {"error": f"HTTP {code}", "kind": "again" if again else "final"}
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return {"error": os.strerror(error.errno), "kind": "disk"}
    # fsspec's HTTP driver says "no such file" for a server that it could not reach, too
    if isinstance(error, FileNotFoundError) and not (url.startswith("http") and error.__cause__):
        return {"error": "no such file", "kind": "final"}
    if isinstance(error, PermissionError):
        return {"error": "access denied", "kind": "final"}
    text = str(chain[-1]).strip().split("\n")[0]
    return {"error": f"{type(chain[-1]).__name__}: {text}" if text else type(chain[-1]).__name__, "kind": "again"}


def _status(error: Any) -> int | None:
    """The HTTP status that a driver's exception carries: aiohttp's, gcsfs's, huggingface_hub's."""
    code = getattr(error, "status", None)
    if type(error).__name__ == "HttpError":  # of gcsfs; aiohttp's errors of transfer have a `code` that means nothing
        code = code or getattr(error, "code", None)
    code = code or getattr(getattr(error, "response", None), "status_code", None)
    return code if isinstance(code, int) and 400 <= code < 600 else None


def _die_with_parent() -> None:
    """The other end of standard input is closed by the death of whoever asked; then nobody wants the bytes."""
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)  # a group of its own, with the command of a pipe


def main() -> None:
    """Read the request, print the answers."""
    line = b""
    while not line.endswith(b"\n"):
        part = os.read(0, 1 << 16)
        if not part:
            return
        line += part
    request = json.loads(line)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        for found in answer(request):
            print(json.dumps(found), flush=True)
    except Exception as error:  # drivers raise anything; the text of it goes to the user
        print(json.dumps(fault(error, request.get("url") or request.get("pattern") or "")), flush=True)
    # Not through the interpreter's end, where drivers wait for their event loops.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    if sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
        del sys.path[0]  # the names in this folder are no top-level modules
    main()

"""A web server on this machine that holds files and misbehaves as told."""

import hashlib
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Store:
    """files: path → bytes. faults: path → what the next GETs meet, one each; `always`: path → what all of them meet.

    A fault is a status ("500"), "short" (half of the announced bytes), "unannounced" (half, and no length), "stall"
    (half, then nothing), "moved" (to /elsewhere/…, which is served) or "slow" (a second between the halves).
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: defaultdict[str, list[str]] = defaultdict(list)
        self.always: dict[str, str] = {}
        self.gets: list[str] = []  # what was asked for, with the query
        self.address = ""
        self.stop = threading.Event()

    def url(self, path: str, user: str = "") -> str:
        return f"http://{user}{self.address}/{path}"


@contextmanager
def serve() -> Iterator[Store]:
    """A store with no files, served until the block ends."""
    store = Store()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            path = self.path.split("?")[0].strip("/")
            if body:
                store.gets.append(self.path.strip("/"))
            fault = store.always.get(path, "")
            if body and store.faults[path]:
                fault = store.faults[path].pop(0)
            if fault == "moved":
                self.send_response(302)
                self.send_header("Location", f"/elsewhere/{path}")
                self.end_headers()
                return
            data = store.files.get(path.removeprefix("elsewhere/"))
            if path in ("", "shards") and data is None:
                links = "".join(f'<a href="{name.rpartition("/")[2]}">x</a>' for name in store.files)
                data = f"<html>{links}</html>".encode()
            if fault.isdigit() or data is None:
                self.send_response(int(fault or 404))
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(200)
            self.send_header("ETag", hashlib.md5(data).hexdigest())
            self.send_header("Content-Type", "application/x-tar" if path.endswith("tar") else "text/html")
            if not (body and fault == "unannounced"):
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if not body:
                return
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            if fault in ("short", "unannounced"):
                return
            if fault == "stall":
                store.stop.wait(60)
                return
            if fault == "slow":
                store.stop.wait(1)
            self.wfile.write(data[len(data) // 2 :])

        def log_message(self, *_: object) -> None:
            pass

        def handle(self) -> None:
            try:
                super().handle()
            except OSError:  # a client that was killed
                pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    store.address = f"127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield store
    finally:
        store.stop.set()
        server.shutdown()
        thread.join()
        server.server_close()

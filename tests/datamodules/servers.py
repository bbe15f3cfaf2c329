"""Servers on loopback for the tests of remote shards: a web server with faults, S3 (moto) and Google storage."""

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class WebServer(ThreadingHTTPServer):
    """Serves a folder. `faults[path]` says how requests for it go wrong, and how often (None: always).

    Faults: an HTTP status as a string, "cut" in the middle, "trickle" after it, "stall" before the middle, "short" (too
    few bytes, and the header says so), "refuse" (closed without an answer). `slow` is a pause in each file; `requests`
    counts GETs; `redirect` is where everything has moved, with {path} in it.
    """

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        self.faults: dict[str, tuple[str, int | None]] = {}
        self.requests, self.authorizations = Counter[str](), set[str]()
        self.slow, self.redirect = 0.0, ""
        self.most_at_once = self.at_once = 0
        self.lock, self.ended = threading.Lock(), threading.Event()
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(root)))
        self.url = f"http://127.0.0.1:{self.server_port}"

    def fault(self, path: str) -> str | None:
        with self.lock:
            kind, left = self.faults.get(path, (None, None))
            if kind is not None and left is not None:
                self.faults[path] = (kind, left - 1)
                return kind if left > 0 else None
            return kind


class Handler(SimpleHTTPRequestHandler):
    server: WebServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        with self.server.lock:
            self.server.requests[self.path] += 1
            self.server.authorizations.add(self.headers.get("Authorization", ""))
            self.server.at_once += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.at_once)
        try:
            self._answer()
        finally:
            with self.server.lock:
                self.server.at_once -= 1

    def _answer(self) -> None:
        fault = self.server.fault(self.path)
        if fault == "refuse":
            self.close_connection = True
            return
        if fault is not None and fault.isdigit():
            self.send_error(int(fault))
            return
        if self.server.redirect:
            self.send_response(302)
            self.send_header("Location", self.server.redirect.format(path=self.path))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        if fault == "short":
            data = data[: len(data) // 2]
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        self.end_headers()
        middle = len(data) // 2
        self.wfile.write(data[:middle])
        self.wfile.flush()
        if fault == "cut":
            self.close_connection = True
            return
        if fault == "trickle":
            for i in range(middle, middle + 100):
                with contextlib.suppress(OSError):
                    self.wfile.write(data[i : i + 1])
                if self.server.ended.wait(0.05):
                    break
            self.close_connection = True
            return
        if fault == "stall":
            self.server.ended.wait(60)
        time.sleep(self.server.slow)
        with contextlib.suppress(OSError):
            self.wfile.write(data[middle:])

    def do_HEAD(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(path.stat().st_size))
        self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def web_server(root: Path) -> Iterator[WebServer]:
    server = WebServer(root)
    with _running(partial(server.serve_forever, 0.05), server.shutdown):
        yield server
        server.ended.set()
    server.server_close()


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """The endpoint of moto's S3."""
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()  # or it would go on with the endpoint of an earlier test
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        server.stop()


@contextlib.contextmanager
def google_server() -> Iterator[str]:
    """The endpoint of gcp-storage-emulator, in memory, with the bucket `pictures`."""
    from gcp_storage_emulator.server import create_server
    from gcsfs.core import GCSFileSystem

    GCSFileSystem.clear_instance_cache()

    server = create_server("127.0.0.1", 0, in_memory=True, default_bucket="pictures")
    server.start()
    try:
        host, port = server._api._httpd.server_address
        yield f"http://{host}:{port}"
    finally:
        server.stop()


@contextlib.contextmanager
def _running(serve: Callable[[], None], stop: Callable[[], None]) -> Iterator[None]:
    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop()
        thread.join()

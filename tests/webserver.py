"""A server of static files on loopback, as good or as poor as a test wants it."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote


@dataclass
class WebServer:
    """Files by their path, unquoted, and how they are served.

    Attributes:
        ranges: whether a part of a file can be asked for.
        tags, dates: whether answers carry ETag and Last-Modified.
        most: bytes of one answer at most; the rest must be asked for again.
        skew: added to the offset of each range, with an honest Content-Range.
        status: answered to everything, where not 0.
        asked: (path, range header) of each request.
        before: called with the path before each answer.
    """

    port: int = 0
    files: dict[str, bytes] = field(default_factory=dict)
    ranges: bool = True
    tags: bool = False
    dates: bool = True
    most: int = 1 << 40
    skew: int = 0
    status: int = 0
    asked: list[tuple[str, str]] = field(default_factory=list)
    before: Callable[[str], None] = lambda path: None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextlib.contextmanager
def serve() -> Iterator[WebServer]:
    """Run a server for the time of the block."""
    state = WebServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            path, asked = unquote(self.path), self.headers.get("Range", "")
            state.asked.append((path, asked))
            state.before(path)
            data = state.files.get(path)
            if state.status or data is None:
                return self._head(state.status or 404, 0)
            tag = f'"{hash(data)}"'
            match = re.fullmatch(r"bytes=(\d+)-(\d*)", asked) if state.ranges else None
            if match and self.headers.get("If-Range", tag if state.tags else "today") in (tag, "today"):
                first = int(match[1]) + state.skew
                part = data[first : int(match[2] or 1 << 60) + 1 + state.skew][: state.most]
                if not part:
                    return self._head(416, 0)
                self._head(206, len(part), tag, f"bytes {first}-{first + len(part) - 1}/{len(data)}")
                self.wfile.write(part)
            else:
                self._head(200, len(data), tag)
                self.wfile.write(data)

        def _head(self, status: int, size: int, tag: str = "", place: str = "") -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(size))
            if place:
                self.send_header("Content-Range", place)
            if tag and state.tags:
                self.send_header("ETag", tag)
            if tag and state.dates:
                self.send_header("Last-Modified", "Wed, 21 Oct 2015 07:28:00 GMT")
            self.end_headers()

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *args: object) -> None:
            """Clients that leave early are what is tested."""

    with Quiet(("127.0.0.1", 0), Handler) as server:
        state.port = server.server_port
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield state
        finally:
            server.shutdown()

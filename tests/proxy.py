"""A proxy that breaks HTTP transfers on purpose, and counts what it broke."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections import Counter
from dataclasses import dataclass
from types import TracebackType

BLOCK = 1 << 16
UNAVAILABLE = b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


@dataclass
class _Fault:
    kind: str
    times: int
    after: int = 0
    seconds: float = 0.0
    request: str = ""


class FaultProxy:
    """Stands before a server on loopback and hands each request on, on a connection of its own.

    A fault is armed for a number of times and spent only where it really happens: a cut after 5 MB leaves an answer of
    1 kB alone. `counts` has the number of each kind that happened, and `requests`.

    Attributes:
        port: where it listens.
        counts: how often each fault happened, by the name of the method that arms it, and "requests".
        asked: (method, range header or "") of each request, in order of arrival.
    """

    def __init__(self, target_port: int) -> None:
        self._target = ("127.0.0.1", target_port)
        self._faults: list[_Fault] = []
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.counts: Counter[str] = Counter()
        self.asked: list[tuple[str, str]] = []

    def __enter__(self) -> FaultProxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._closed.set()
        # accept() does not wake when its socket is closed by another thread; a connection wakes it.
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
        self._listener.close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def cut(self, after: int, times: int = 1) -> None:
        """Close the connection after `after` bytes of an answer's body."""
        self._faults.append(_Fault("cut", times, after))

    def stall(self, after: int, seconds: float, times: int = 1) -> None:
        """Send nothing for `seconds` after `after` bytes of an answer's body, then close the connection."""
        self._faults.append(_Fault("stall", times, after, seconds))

    def corrupt(self, at: int, times: int = 1) -> None:
        """Change byte `at` of an answer's body."""
        self._faults.append(_Fault("corrupt", times, at))

    def unavailable(self, times: int) -> None:
        """Answer 503 without asking the server."""
        self._faults.append(_Fault("unavailable", times))

    def swallow(self, times: int = 1, request: str = "PUT ") -> None:
        """Let a request reach the server, and close the connection instead of handing its answer back.

        Args:
            request: pattern that the start of the request line matches.
        """
        self._faults.append(_Fault("swallow", times, request=request))

    def cut_upload(self, after: int, times: int = 1) -> None:
        """Close the connection after `after` bytes of a request's body; the server sees a torn request."""
        self._faults.append(_Fault("cut_upload", times, after))

    def stall_upload(self, after: int, seconds: float, times: int = 1) -> None:
        """Take nothing for `seconds` after `after` bytes of a request's body, then close the connection."""
        self._faults.append(_Fault("stall_upload", times, after, seconds))

    def mend(self) -> None:
        """Break nothing more."""
        with self._lock:
            self._faults.clear()

    def _due(self, kind: str, size: int = 0, request: str = "") -> _Fault | None:
        """Spend a fault of this kind, if one is armed for a transfer of `size` bytes so far or for this request."""
        with self._lock:
            for fault in self._faults:
                if fault.kind == kind and fault.times and size >= fault.after and re.match(fault.request, request):
                    fault.times -= 1
                    self.counts[kind] += 1
                    return fault
        return None

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while not self._closed.is_set():
                connection, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            head, rest = _read_head(client)
            if not head or self._closed.is_set():
                return
            fields = _fields(head)
            line = head.split(b"\r\n", 1)[0].decode("latin-1")
            size = int(fields.get("content-length", 0))
            with self._lock:
                self.counts["requests"] += 1
                self.asked.append((line.split(" ")[0], fields.get("range", "")))
            if self._due("unavailable"):
                # The whole request is taken first: closing on unread bytes would reset the connection.
                while len(rest) < size and (block := client.recv(BLOCK)):
                    rest += block
                client.sendall(UNAVAILABLE)
                return
            with socket.create_connection(self._target) as server:
                server.sendall(head.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
                if self._pass(client, server, rest, size, "_upload"):
                    head, rest = _read_head(server)
                    if not self._due("swallow", request=line):
                        client.sendall(head)
                        self._pass(server, client, rest, None, "")

    def _pass(self, source: socket.socket, target: socket.socket, block: bytes, size: int | None, way: str) -> bool:
        """Hand `size` bytes on (None: all that come), the first of them in `block`; False where a fault ended it."""
        sent = 0
        while size is None or sent < size:
            block = block or source.recv(BLOCK)
            if not block:
                return size is None
            for kind in ("cut", "stall"):
                if fault := self._due(kind + way, sent + len(block)):
                    target.sendall(block[: max(0, fault.after - sent)])
                    self._closed.wait(fault.seconds)
                    return False
            if not way and (fault := self._due("corrupt", sent + len(block) - 1)):
                place = max(0, fault.after - sent)
                block = block[:place] + bytes([block[place] ^ 1]) + block[place + 1 :]
            target.sendall(block)
            sent += len(block)
            block = b""
        return True


def _read_head(connection: socket.socket) -> tuple[bytes, bytes]:
    """(head with its empty line, bytes that came after it)."""
    data = b""
    while b"\r\n\r\n" not in data:
        block = connection.recv(BLOCK)
        if not block:
            return b"", b""
        data += block
    head, end, rest = data.partition(b"\r\n\r\n")
    return head + end, rest


def _fields(head: bytes) -> dict[str, str]:
    lines = head.decode("latin-1").split("\r\n")[1:]
    return {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}

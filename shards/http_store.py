"""Datasets behind `http://` and `https://`: any server of static files, read only.

The standard library's client, with our own patience: obstore takes up a broken answer only where the server sends
entity tags, which many servers of plain files do not. Proxies are taken from the environment.
"""

from __future__ import annotations

import contextlib
import re
import ssl
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from functools import lru_cache
from http.client import HTTPException, HTTPResponse
from typing import Any, NoReturn
from urllib.error import HTTPError
from urllib.parse import quote, unquote, urlsplit
from urllib.request import OpenerDirector, Request, build_opener

from shards.errors import UserError
from shards.remote import (
    SLOWEST,
    TIMEOUT,
    EndsEarly,
    Passing,
    RemoteStore,
    Retries,
    Stopped,
    never,
    pieces,
    read_joined,
)
from shards.storage import Object, StorageError, check_name

BLOCK = 1 << 18
KNOCKS = 3
"""Attempts at a server that never answered before it is taken for absent."""
OVERLOAD = (408, 425, 429)
_EPOCH = datetime.fromtimestamp(0, timezone.utc)


class HttpStore(RemoteStore):
    """A folder of a web server."""

    def __init__(self, uri: str) -> None:
        match = re.fullmatch(r"(https?)://([^/?#@\s]+)(/[^?#]*)?", uri)
        if not match or not _is_host(uri):
            # The rest stays unsaid: it may hold a password or a signature.
            raise UserError(f"{uri.partition('://')[0]}://...: expected https://host/path (no credentials, no query)")
        self.uri = uri.rstrip("/")
        # A path as a browser shows it, or as it copies it: what is quoted already stays so.
        path = quote((match[3] or "").rstrip("/"), safe="/%:@!$&'()*+,;=~")
        self._base = f"{match[1]}://{match[2]}{path}"
        self._answered, self._knocks = False, 0

    def read(self, name: str) -> bytes:
        # The object may be replaced between two attempts: the rest is asked for on the condition that it was not.
        data, stamp, retries = bytearray(), "", Retries()
        while True:
            headers = {"Range": f"bytes={len(data)}-", "If-Range": stamp} if data and stamp else {}
            try:
                with self._answer(name, headers) as answer:
                    first, total = self._place(name, answer)
                    if first != len(data) or _stamp(answer) != stamp:
                        if first:
                            data.clear()
                            raise Passing(f"{self.uri}/{name}: changed while it was read")
                        data, stamp = bytearray(), _stamp(answer)
                    data += _body(answer, total - first, never)
                if len(data) == total:
                    return bytes(data)
                fault = Passing(f"{self.uri}/{name}: cut, {len(data)} bytes came of {total}")
            except Passing as error:
                fault = error
            retries.wait(fault, len(data))

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        def fetch(spans: list[tuple[int, int]]) -> list[bytes]:
            return [b"".join(pieces(self, name, start, end - start)) for start, end in spans]

        return [bytes(part) for part in read_joined(ranges, fetch)]

    def read_some(self, name: str, offset: int, size: int, stopped: Callable[[], bool] = never) -> Any:
        where = f"{self.uri}/{name}"
        with self._answer(name, {"Range": f"bytes={offset}-{offset + size - 1}"}) as answer:
            first, total = self._place(name, answer)
            if answer.status == 200 and offset:
                raise StorageError(
                    f"{where}: the server cannot send a part of a file; copy the dataset to a folder or a bucket, or "
                    "use a server with range requests (nginx, Apache, Caddy)"
                )
            if first != offset:
                raise Passing(f"{where}: bytes from {first} on came instead of from {offset} on")
            if total < offset + size:
                raise EndsEarly(f"{where}: cut, ends before byte {offset + size}")
            return _body(answer, size, stopped)

    def find(self, name: str) -> Object | None:
        # The first byte, not HEAD: some servers refuse HEAD, and answers that are made while they are sent have no
        # length, which a range has.
        retries = Retries()
        while True:
            try:
                with self._answer(name, {"Range": "bytes=0-0"}) as answer:
                    total = self._place(name, answer)[1]
                    return Object(name, total, _modified(answer), _stamp(answer) or f"unknown-{time.time_ns()}")
            except FileNotFoundError:
                return None
            except EndsEarly:
                return Object(name, 0, _EPOCH, "empty")
            except Passing as fault:
                retries.wait(fault)

    def read_version(self, name: str) -> tuple[bytes, Any] | None:
        try:
            return self.read(name), None
        except FileNotFoundError:
            return None

    def list(self, prefix: str = "") -> Iterator[Object]:
        self._refuse()

    def delete(self, names: Iterable[str]) -> None:
        self._refuse()

    def draft(self) -> NoReturn:
        self._refuse()

    def swap(self, name: str, data: bytes, version: Any | None) -> None:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise UserError(
            f"{self.uri}: read-only: a web server takes no objects and lists none; build into a folder or a bucket"
        )

    @contextlib.contextmanager
    def _answer(self, name: str, headers: dict[str, str]) -> Iterator[HTTPResponse]:
        where = f"{self.uri}/{name}"
        url = f"{self._base}/{quote(check_name(name, self.uri))}"
        request = Request(url, headers={"Accept-Encoding": "identity", "User-Agent": "faces2voices", **headers})
        try:
            with _opener().open(request, timeout=TIMEOUT.total_seconds()) as answer:
                self._answered = True
                yield answer
        except HTTPError as error:
            self._answered = True
            error.close()
            if error.code in (404, 410):
                raise FileNotFoundError(where) from None
            if error.code == 416:
                raise EndsEarly(f"{where}: cut, ends before the bytes that were asked for") from None
            if error.code in OVERLOAD or error.code >= 500:
                raise Passing(f"{where}: the server answers {error.code}") from None
            if error.code in (401, 403):
                raise StorageError(f"{where}: access denied ({error.code}); only public files are read") from None
            raise StorageError(f"{where}: the server answers {error.code}") from None
        except (OSError, HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)
            words = f"{where}: no answer from the server ({' '.join(str(reason or type(reason).__name__).split())})"
            self._knocks += not self._answered
            absent = not self._answered and self._knocks >= KNOCKS
            if absent or isinstance(reason, ssl.SSLCertVerificationError | ValueError):
                raise StorageError(words) from None
            raise Passing(words) from None

    def _place(self, name: str, answer: HTTPResponse) -> tuple[int, int]:
        """(offset of the first byte of an answer, size of the whole object)."""
        if answer.headers.get("Content-Encoding", "identity") != "identity":
            raise StorageError(f"{self.uri}/{name}: the server compresses; it must send files as they are")
        if answer.status == 206:
            match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range", "").strip())
            first, total = (match[1], match[2]) if match else (None, None)
        else:
            first, total = "0", answer.headers.get("Content-Length")
        if first is None or total is None:
            raise StorageError(f"{self.uri}/{name}: the server does not say how long the file is")
        return int(first), int(total)


def split_url(uri: str) -> tuple[str, str]:
    """(URI of the folder, name) of a single file.

    Raises:
        UserError: credentials or a query, which may be one.
    """
    folder, _, name = HttpStore(uri).uri.rpartition("/")
    if folder.endswith("/"):
        raise UserError(f"{uri}: names a server, not a file on it")
    return folder, unquote(name)


@lru_cache
def _opener() -> OpenerDirector:
    return build_opener()


def _is_host(uri: str) -> bool:
    try:
        parts = urlsplit(uri)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _body(answer: HTTPResponse, size: int, stopped: Callable[[], bool]) -> bytearray:
    """Up to `size` bytes: what came before the transfer broke or stood still; an error where nothing did."""
    data = bytearray()
    began, before = time.monotonic(), 0
    while len(data) < size:
        if stopped():
            raise Stopped
        try:
            block = answer.read1(min(BLOCK, size - len(data)))
        except (OSError, HTTPException):
            if data:
                return data
            raise
        if not block:
            break
        data += block
        # The time limit of a socket is for each byte; a server that drips is dropped here.
        spent = time.monotonic() - began
        if spent > TIMEOUT.total_seconds():
            if len(data) - before < SLOWEST:
                break
            began, before = time.monotonic(), len(data)
    if size and not data:
        raise TimeoutError("cut before the first byte")
    return data


def _stamp(answer: HTTPResponse) -> str:
    """What changes with the content; weak tags are left out, since they hold for similar bytes too."""
    tag = answer.headers.get("ETag", "")
    return tag if tag.startswith('"') else answer.headers.get("Last-Modified", "")


def _modified(answer: HTTPResponse) -> datetime:
    try:
        found = parsedate_to_datetime(answer.headers["Last-Modified"])
        return found if found.tzinfo else found.replace(tzinfo=timezone.utc)
    except (TypeError, ValueError):
        return _EPOCH

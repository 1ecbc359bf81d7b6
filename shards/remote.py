"""What stores across a network share: patience with broken transfers, and reading by byte ranges."""

from __future__ import annotations

import io
import os
import random
import time
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, BinaryIO

from shards.storage import Object, StorageError, Store

TIMEOUT = timedelta(seconds=30)
"""How long a transfer may stand still; then it is dropped and taken up anew."""
RETRY_FOR = timedelta(minutes=3)
"""How long a request is repeated."""
SLOWEST = 1 << 16
"""Bytes per second: a line that was faster than this over all its breaks is not given up."""
PAUSE = (0.1, 10.0)
"""Seconds before the first repetition and the longest before any; between them it doubles."""
PART = 8 << 20
"""Bytes of one request of a stream."""
GAP = 1 << 20
"""Bytes between two wanted ranges that are cheaper to fetch than another request."""
_TICK = 0.2

_jitter = random.Random()


class Passing(StorageError):
    """A fault that may be gone at the next attempt: a cut, a stall, an overloaded server."""


class EndsEarly(StorageError):
    """The object has fewer bytes than were asked for."""


class Stopped(Exception):
    """The caller no longer wants the bytes."""


def never() -> bool:
    """A read that nobody stops."""
    return False


class RemoteStore(Store):
    """A store that is read by requests for byte ranges."""

    @abstractmethod
    def read_some(self, name: str, offset: int, size: int, stopped: Callable[[], bool] = never) -> Any:
        """Bytes of an object from `offset` on: one at least, all `size` of them unless the transfer broke.

        Args:
            stopped: asked while the bytes come.

        Raises:
            FileNotFoundError: no such object.
            Passing: nothing came this time.
            EndsEarly: the object ends before the range does.
            StorageError: nothing will come, for example access denied.
            Stopped: `stopped()` is true.
        """

    def open(self, name: str) -> BinaryIO:
        found = self.find(name)
        if found is None:
            raise FileNotFoundError(f"{self.uri}/{name}")
        return io.BufferedReader(_Stream(self, found), PART)


class Retries:
    """Exponential pauses with jitter between the attempts of one transfer, until `RETRY_FOR` is over.

    Args:
        stopped: ends a pause.
        counted: called with the fault before each repetition.
    """

    def __init__(self, stopped: Callable[[], bool] = never, counted: Callable[[Passing], None] | None = None) -> None:
        self._stopped, self._counted = stopped, counted
        self._began = time.monotonic()
        self._pause = PAUSE[0]

    def progressed(self) -> None:
        """Bytes came: the next pause is short again."""
        self._pause = PAUSE[0]

    def wait(self, fault: Passing, done: int = 0) -> None:
        """Pause before the next attempt.

        Args:
            done: bytes that came so far.

        Raises:
            Passing: `fault`, where time is up.
            Stopped: nobody wants the next attempt.
        """
        if time.monotonic() - self._began > RETRY_FOR.total_seconds() + done / SLOWEST:
            raise fault
        if self._counted is not None:
            self._counted(fault)
        # Many readers that broke together must not come back together.
        end = time.monotonic() + self._pause * _jitter.uniform(0.5, 1.5)
        self._pause = min(2 * self._pause, PAUSE[1])
        while (left := end - time.monotonic()) > 0:
            if self._stopped():
                raise Stopped
            time.sleep(min(left, _TICK))


def pieces(
    store: RemoteStore,
    name: str,
    offset: int,
    size: int,
    stopped: Callable[[], bool] = never,
    counted: Callable[[Passing], None] | None = None,
) -> Iterator[Any]:
    """The bytes of a range in order, taken up after each break where it was.

    Args:
        counted: called with the fault before each repetition.

    Raises:
        FileNotFoundError: no such object.
        EndsEarly: the object ends before the range does.
        StorageError: storage does not answer in time, or refuses.
        Stopped: `stopped()` is true.
    """
    retries, done = Retries(stopped, counted), 0
    while True:
        if stopped():
            raise Stopped
        try:
            piece = store.read_some(name, offset + done, size - done, stopped)
            retries.progressed()
            yield piece
            done += len(piece)
            fault = Passing(f"{store.uri}/{name}: cut, {done} bytes came of {size}")
        except Passing as error:
            fault = error
        if done == size:
            return
        retries.wait(fault, done)


def read_joined(
    ranges: Sequence[tuple[int, int]], fetch: Callable[[list[tuple[int, int]]], Sequence[Any]]
) -> Iterator[memoryview]:
    """Bytes of each (offset, size), where ranges that lie close together are fetched as one.

    Args:
        fetch: (start, end) of each span -> its bytes. HTTP has no empty range, and none is asked for.

    Yields:
        As many bytes as came of each range; fewer than its size where its span is short.
    """
    spans: list[tuple[int, int]] = []
    for start, end in sorted((offset, offset + size) for offset, size in ranges if size):
        near = spans.pop() if spans and start <= spans[-1][1] + GAP else (start, end)
        spans.append((near[0], max(near[1], end)))
    starts = [start for start, _ in spans]
    found = fetch(spans) if spans else []
    for offset, size in ranges:
        span = bisect_right(starts, offset) - 1
        begin = offset - starts[span] if size else 0
        yield memoryview(found[span])[begin : begin + size] if size else memoryview(b"")


class _Stream(io.RawIOBase):
    """An object as a file: each read is a range request of its own, so a cut costs one request."""

    def __init__(self, source: Store, found: Object) -> None:
        self._source, self._object = source, found
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._object.size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readall(self) -> bytes:
        # The inherited one asks for 8 kB at a time.
        data = bytearray(max(0, self._object.size - self._position))
        done = 0
        while done < len(data):
            done += self.readinto(memoryview(data)[done:])
        return bytes(data)

    def readinto(self, buffer: Any) -> int:
        size = max(0, min(len(buffer), PART, self._object.size - self._position))
        if size:
            buffer[:size] = self._source.read_ranges(self._object.name, [(self._position, size)])[0]
            self._position += size
        return size

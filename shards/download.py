"""One object in parallel parts, hashed while it comes."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from shards.errors import warn
from shards.remote import PART, RETRY_FOR, Passing, RemoteStore, Stopped, pieces
from shards.shard_cache import Filling
from shards.storage import BLOCK

PARTS = 8
"""Requests under way at once, over all objects."""
TICK = 0.2
"""Seconds after which a wait looks up."""
OUTAGE = 5.0
"""Seconds without a byte, and with faults instead, after which the user is told."""
SILENCE = 20.0
"""The same where no fault was seen: obstore repeats requests without saying so."""


@dataclass
class FetchStats:
    """What a source of shards did.

    Attributes:
        fetched_bytes: that came over the network.
        hits: shards that were in the cache when they were first looked for.
        refetched: shards that came with wrong bytes and were fetched once more.
        retries: requests that were repeated; those that obstore repeats inside are not seen.
        waited_s: seconds that the caller waited for shards.
    """

    fetched_bytes: int = 0
    hits: int = 0
    refetched: int = 0
    retries: int = 0
    waited_s: float = 0.0


@dataclass
class _Line:
    """How a store answers. Changed under the downloader's lock.

    Attributes:
        since: when its last bytes came, or when it was first asked after a time without need.
        fault: the last one since then.
        told: whether the user knows.
    """

    since: float
    fault: str = ""
    told: bool = False


@dataclass(eq=False)
class _Download:
    """Changed under the downloader's lock."""

    store: RemoteStore
    name: str
    size: int
    filling: Filling
    stopped: Callable[[], bool]
    urgent: Callable[[], bool]
    todo: deque[int]
    done: set[int] = field(default_factory=set)
    running: int = 0
    error: BaseException | None = None


class Downloader:
    """Threads that fetch parts of objects.

    Args:
        stats: where bytes and repetitions are counted.
    """

    def __init__(self, stats: FetchStats) -> None:
        self._stats = stats
        self._changed = threading.Condition()
        self._active: list[_Download] = []
        self._lines: dict[str, _Line] = {}
        self._closed = False
        self.threads = [threading.Thread(target=self._work, name="parts", daemon=True) for _ in range(PARTS)]
        for thread in self.threads:
            thread.start()

    def fetch(
        self,
        store: RemoteStore,
        name: str,
        size: int,
        filling: Filling,
        stopped: Callable[[], bool],
        urgent: Callable[[], bool],
    ) -> str:
        """Fill a file with an object's bytes.

        Args:
            size: of the object.
            stopped, urgent: asked all along; parts of urgent objects go first.

        Returns:
            sha256 of the bytes, hex.

        Raises:
            FileNotFoundError: no such object.
            EndsEarly: it has fewer bytes.
            StorageError: storage does not answer.
            UserError: the disk refuses.
            Stopped: `stopped()` is true.
        """
        offsets = range(0, size, PART)
        download = _Download(store, name, size, filling, stopped, urgent, deque(offsets))
        digest = hashlib.sha256()
        with self._changed:
            if not any(other.store.uri == store.uri for other in self._active):
                # After a failed attempt the outage is still the one that was told.
                line = self._lines.setdefault(store.uri, _Line(0.0))
                line.since = time.monotonic()
            self._active.append(download)
            self._changed.notify_all()
        try:
            for offset in offsets:
                with self._changed:
                    while offset not in download.done:
                        if download.error is not None:
                            raise download.error
                        if self._closed or stopped():
                            raise Stopped
                        self._tell(store.uri)
                        self._changed.wait(TICK)
                end = min(offset + PART, size)
                for at in range(offset, end, BLOCK):
                    digest.update(filling.read(at, min(BLOCK, end - at)))
        finally:
            # The file is closed after this: no part may still be on its way to it.
            with self._changed:
                self._active.remove(download)
                download.error = download.error or Stopped()
                while download.running:
                    self._changed.wait(TICK)
        return digest.hexdigest()

    def close(self) -> None:
        """Have the threads stop."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                download = self._next()
                if download is None:
                    return
                offset = download.todo.popleft()
                download.running += 1
            error: BaseException | None = None
            try:
                self._part(download, offset)
            except BaseException as raised:
                error = raised
            with self._changed:
                download.running -= 1
                if error is None:
                    download.done.add(offset)
                else:
                    download.error = download.error or error
                self._changed.notify_all()

    def _next(self) -> _Download | None:
        """A download with parts to fetch; waits for one. None at the end."""
        while not self._closed:
            found = [one for one in self._active if one.todo and one.error is None]
            if found:
                return min(found, key=lambda one: not one.urgent())
            self._changed.wait()
        return None

    def _part(self, download: _Download, offset: int) -> None:
        def stopped() -> bool:
            return self._closed or download.error is not None or download.stopped()

        size = min(PART, download.size - offset)
        uri = download.store.uri

        def count_retry(fault: Passing) -> None:
            with self._changed:
                self._stats.retries += 1
                self._lines[uri].fault = str(fault).removeprefix(f"{uri}/{download.name}: ")

        for piece in pieces(download.store, download.name, offset, size, stopped, count_retry):
            download.filling.write(offset, memoryview(piece))
            offset += len(piece)
            with self._changed:
                self._stats.fetched_bytes += len(piece)
                self._lines[uri] = _Line(time.monotonic())

    def _tell(self, uri: str) -> None:
        """Warn once where a store has been silent for long. Called under the lock."""
        line = self._lines[uri]
        silent = time.monotonic() - line.since
        if not line.told and silent > (OUTAGE if line.fault else SILENCE):
            line.told = True
            what = line.fault or f"nothing came for {silent:.0f} s"
            warn(f"{uri}: {what}; trying again for up to {RETRY_FOR.total_seconds():.0f} s")

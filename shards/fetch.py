"""Shards as local files, fetched ahead of their use.

Threads of the process that calls `want` fetch remote shards into the machine's cache and read local ones ahead. A
process that is forked from it may open the files that `path` gave, but has no threads and must not use the source; its
copies of the cache's locks are given up at once.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakSet

from shards.download import TICK, FetchStats
from shards.errors import UserError
from shards.remote import RETRY_FOR, Stopped
from shards.shard_cache import Busy, Full, Pin
from shards.storage import StorageError, is_remote
from shards.supply import CorruptShard, ShardRef, Supply

SHARDS = 3
"""Shards under way at once: while one is hashed, the next ones come."""
LOOK_AGAIN = 0.1
"""Seconds after which a shard that another process fetches, or that is needed and found no room, is looked at again."""
AHEAD_AGAIN = 1.0
"""The same for a shard that is fetched ahead and gave way."""
AHEAD_FAILED = 10.0
"""The same for one that could not be fetched; only when it is needed does that become an error."""
CLOSING = 2.0
"""Seconds that `close` waits for its threads."""


@dataclass(eq=False)
class _Entry:
    """A shard that is wanted.

    Attributes:
        urgent: needed at once; such a shard is pinned in the cache, one that is fetched ahead only lies there.
        again: time before which it is not looked at.
        full_since: when an urgent one first found no room.
        yields: stop fetching this one, an urgent one needs the room.
    """

    ref: ShardRef
    urgent: bool
    path: Path | None = None
    pin: Pin | None = None
    error: Exception | None = None
    busy: bool = False
    gone: bool = False
    seen: bool = False
    again: float = 0.0
    full_since: float | None = None
    yields: bool = False


class Interrupted(Exception):
    """Somebody asked that nothing be waited for any more."""


class ShardSource:
    """Makes shards available as local files.

    Args:
        cache: folder of the machine's cache; made when the first remote shard is wanted.
        cache_bytes: its limit.
        verify: whether local shards are checked against their sha256, once in the life of the source. Fetched ones
            always are.
        enough: bytes of the cache with which the caller never needs too much at once, for the message when it does.

    Attributes:
        stats: what was fetched.
        interrupted: set it, from a signal handler too, and nothing is waited for any more.
    """

    def __init__(self, cache: Path, cache_bytes: int, verify: bool = True, enough: int = 0) -> None:
        self.stats = FetchStats()
        self._folder, self._limit, self._enough = cache, cache_bytes, enough
        self._supply = Supply(cache, cache_bytes, verify, self.stats)
        self._wanted: tuple[tuple[ShardRef, ...], int] | None = None
        self._entries: dict[ShardRef, _Entry] = {}
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._closed, self._process = False, os.getpid()
        self.interrupted = False
        _sources.add(self)

    def __enter__(self) -> ShardSource:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def want(self, refs: Sequence[ShardRef], now: int = 0) -> None:
        """Begin to make shards available, first ones first, and let go of those not named.

        Args:
            now: the first so many are needed at once; the rest are fetched as far as the cache has room for all.

        Raises:
            UserError: those needed at once do not fit into the cache.
        """
        self._check_process()
        if self._wanted == (tuple(refs), now):
            return
        self._check_fit(refs[:now])
        with self._changed:
            entries: dict[ShardRef, _Entry] = {}
            counted: dict[str, int] = {}
            for place, ref in enumerate(refs):
                if ref in entries:
                    continue
                if is_remote(ref.uri):
                    counted[ref.sha256] = ref.bytes
                    if place >= now and sum(counted.values()) > self._limit:
                        break
                entry = self._entries.pop(ref, None) or _Entry(ref, place < now)
                if place < now:
                    self._urge(entry)
                elif entry.urgent:
                    # It stays where it is, but gives way where others need the room.
                    entry.urgent, entry.full_since = False, None
                    if entry.pin is not None:
                        entry.pin.release()
                        entry.pin = None
                entries[ref] = entry
            for entry in self._entries.values():
                self._let_go(entry)
            self._entries, self._wanted = entries, (tuple(refs), now)
            self._start()
            self._changed.notify_all()

    def ready(self, ref: ShardRef) -> bool:
        """Whether `path` would not wait for the network."""
        self._check_process()
        with self._changed:
            entry = self._entries.get(ref)
            return entry is not None and entry.path is not None and entry.path.exists()

    def path(self, ref: ShardRef) -> Path:
        """The shard's file, which stays until a `want` that does not name it. Waits until it is there.

        Raises:
            CorruptShard: the shard is missing or has other bytes, also when fetched a second time.
            StorageError: storage does not answer, or other processes' shards leave no room in the cache.
            UserError: the cache cannot be written.
            Interrupted: `interrupted` was set.
        """
        self._check_process()
        began = time.monotonic()
        with self._changed:
            entry = self._entries.get(ref)
            if entry is None:
                self._check_fit([*(other.ref for other in self._entries.values() if other.urgent), ref])
                entry = _Entry(ref, True)
                self._wanted = None
            if entry.path is None:
                self._entries = {ref: entry, **self._entries}
                self._start()
            self._urge(entry)
            self._changed.notify_all()
            try:
                while entry.path is None and entry.error is None and not self._closed:
                    if self.interrupted:
                        raise Interrupted
                    # Briefly, so that the main thread answers signals.
                    self._changed.wait(TICK)
            finally:
                self.stats.waited_s += time.monotonic() - began
            if (error := entry.error) is not None:
                if not isinstance(error, CorruptShard):
                    entry.error = None  # the next call tries again
                raise error
            if entry.path is None:
                raise RuntimeError("the source is closed")
            return entry.path

    def close(self) -> None:
        """Stop all fetching and let go of all shards."""
        if self._process != os.getpid():
            return
        with self._changed:
            self._closed = True
            for entry in self._entries.values():
                self._let_go(entry)
            self._entries, self._wanted = {}, None
            self._changed.notify_all()
        self._supply.close()
        # A thread that waits for a stalled web server ends later, by itself.
        end = time.monotonic() + CLOSING
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _check_process(self) -> None:
        if self._process != os.getpid():
            raise RuntimeError("a source of shards does not work in a forked process; open the files there")

    def _check_fit(self, refs: Sequence[ShardRef]) -> None:
        needed = {ref.sha256: ref.bytes for ref in refs if is_remote(ref.uri)}
        total = sum(needed.values())
        if total > self._limit:
            enough = f"; {self._enough} is enough for all of the run" if self._enough > total else ""
            raise UserError(
                f"{len(needed)} shards are needed at once, {total} bytes together (the largest has "
                f"{max(needed.values())}), and data.cache_bytes is {self._limit}: raise it to that at least{enough}"
            )

    def _urge(self, entry: _Entry) -> None:
        """Have an entry pinned."""
        entry.urgent = True
        if entry.pin is None and is_remote(entry.ref.uri):
            entry.path, entry.again = None, 0.0

    def _let_go(self, entry: _Entry) -> None:
        entry.gone = True
        if entry.pin is not None:
            entry.pin.release()
            entry.pin = None

    def _start(self) -> None:
        if self._closed:
            raise RuntimeError("the source is closed")
        if not self._threads and self._entries:
            self._threads = [threading.Thread(target=self._work, name="shards", daemon=True) for _ in range(SHARDS)]
            for thread in self._threads:
                thread.start()

    def _work(self) -> None:
        """Bring one shard after the other."""
        while True:
            with self._changed:
                entry = self._next()
                if entry is None:
                    return
                entry.busy, entry.yields, urgent = True, False, entry.urgent
            path: Path | None = None
            pin: Pin | None = None
            error: Exception | None = None
            try:
                path, pin = self._bring(entry)
            except Exception as raised:
                error = raised
            with self._changed:
                entry.busy = False
                if pin is not None and (entry.gone or not entry.urgent):
                    pin.release()
                    pin = None
                if error is not None:
                    self._postpone(entry, error, urgent)
                elif pin is not None or not entry.urgent or not is_remote(entry.ref.uri):
                    entry.path, entry.pin = path, pin
                # Else it was looked up ahead and became urgent meanwhile: it is pinned next.
                self._changed.notify_all()

    def _next(self) -> _Entry | None:
        """The first entry with something to do; waits for one. None where the source is closed."""
        while not self._closed:
            at = time.monotonic()
            open_ones = [
                entry
                for entry in self._entries.values()
                if not entry.busy and entry.path is None and entry.error is None
            ]
            for entry in open_ones:
                if entry.again <= at:
                    return entry
            self._changed.wait(min((entry.again - at for entry in open_ones), default=None))
        return None

    def _postpone(self, entry: _Entry, error: Exception, urgent: bool) -> None:
        """Try an entry again later, or have `path` raise its error; `urgent`: whether it was when the attempt began."""
        at = time.monotonic()
        if isinstance(error, Full) and entry.urgent:
            entry.full_since = entry.full_since or at
            for other in self._entries.values():
                other.yields = other.yields or not other.urgent
            entry.again = at + LOOK_AGAIN
            if at - entry.full_since > RETRY_FOR.total_seconds():
                entry.error = StorageError(
                    f"shard cache {self._folder}: shards that other processes use leave no room for {entry.ref.name}; "
                    "raise data.cache_bytes"
                )
        elif isinstance(error, Busy):
            entry.again = at + LOOK_AGAIN
        elif isinstance(error, Full | Stopped):
            entry.again = at if entry.urgent else at + AHEAD_AGAIN
        elif urgent or isinstance(error, CorruptShard):
            entry.error = error
        else:
            entry.again = at if entry.urgent else at + AHEAD_FAILED

    def _bring(self, entry: _Entry) -> tuple[Path, Pin | None]:
        def kept() -> list[str]:
            # What is fetched ahead may take the place of nothing that is wanted.
            with self._changed:
                return [other.ref.sha256 for other in self._entries.values() if other.urgent or not entry.urgent]

        path, pin, hit = self._supply.bring(
            entry.ref,
            kept,
            stopped=lambda: self._closed or entry.gone or (entry.yields and not entry.urgent),
            urgent=lambda: entry.urgent,
        )
        with self._changed:
            self.stats.hits += hit and not entry.seen
            entry.seen = True
        return path, pin


_sources: WeakSet[ShardSource] = WeakSet()


@atexit.register
def _close_all() -> None:
    """No thread may be fetching when the interpreter goes."""
    for source in list(_sources):
        source.close()

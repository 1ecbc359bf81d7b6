"""One shard, from where it lies to a local file."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from shards.download import Downloader, FetchStats
from shards.errors import UserError
from shards.local_store import LocalStore
from shards.remote import EndsEarly, RemoteStore, Stopped
from shards.shard_cache import Pin, ShardCache
from shards.storage import BLOCK, Store, open_store


@dataclass(frozen=True)
class ShardRef:
    """A shard as an index names it; `uri` is of its dataset, `name` of the object in it."""

    uri: str
    name: str
    sha256: str
    bytes: int


class CorruptShard(UserError):
    """A shard is missing, or its bytes are not those that the index names.

    Attributes:
        ref: which.
    """

    def __init__(self, ref: ShardRef, what: str) -> None:
        super().__init__(f"{ref.uri}/{ref.name}: {what}; put the object back, or run `f2v build` on the dataset")
        self.ref = ref


class Supply:
    """Stores, the machine's cache and the threads that download, each opened when it is first needed.

    Args:
        folder, limit: of the cache.
        verify: whether local shards are checked.
        stats: where the work is counted.
    """

    def __init__(self, folder: Path, limit: int, verify: bool, stats: FetchStats) -> None:
        self._folder, self._limit, self._verify, self._stats = folder, limit, verify, stats
        self._cache: ShardCache | None = None
        self._downloader: Downloader | None = None
        self._stores: dict[str, Store] = {}
        self._verified: set[ShardRef] = set()
        self._opening, self._connecting = threading.Lock(), threading.Lock()
        self._closed = False

    def bring(
        self,
        ref: ShardRef,
        kept: Callable[[], Collection[str]],
        stopped: Callable[[], bool],
        urgent: Callable[[], bool],
    ) -> tuple[Path, Pin | None, bool]:
        """A shard's file.

        Args:
            kept: sha256 of shards that must not be evicted for this one.
            stopped, urgent: asked all along.

        Returns:
            (path, the pin that holds it in the cache or None where it is local, whether it was in the cache).

        Raises:
            CorruptShard: it is missing or has other bytes, also when fetched a second time.
            StorageError: storage does not answer.
            UserError: the cache cannot be written.
            Busy, Full, Stopped: not now.
        """
        store = self._store(ref.uri)
        if isinstance(store, LocalStore):
            return self._local(ref, store.path(ref.name), stopped), None, False
        assert isinstance(store, RemoteStore)
        cache, downloader = self._open()
        pin = cache.take(ref.sha256, ref.bytes)
        if pin is not None:
            return pin.path, pin, True
        with cache.begin(ref.sha256, ref.bytes, kept()) as filling:
            # Both attempts in one: no other process begins its own two in between.
            what = ""
            for attempt in range(2):
                with self._opening:
                    self._stats.refetched += attempt
                try:
                    found = downloader.fetch(store, ref.name, ref.bytes, filling, stopped, urgent)
                except FileNotFoundError:
                    raise CorruptShard(ref, "missing") from None
                except EndsEarly:
                    what = f"cut: it ends before its {ref.bytes} bytes"
                    continue
                if found == ref.sha256:
                    pin = filling.publish()
                    return pin.path, pin, False
                what = f"corrupt: its sha256 is {found}, the index says {ref.sha256}"
            raise CorruptShard(ref, what)

    def close(self) -> None:
        """Have the threads stop."""
        with self._opening:
            self._closed = True
            if self._downloader is not None:
                self._downloader.close()

    def _local(self, ref: ShardRef, path: Path, stopped: Callable[[], bool]) -> Path:
        """Check a local shard, which also reads it ahead into the page cache."""
        try:
            size = path.stat().st_size
            if size != ref.bytes:
                raise CorruptShard(ref, f"{size} bytes long, the index says {ref.bytes}")
            if self._verify and ref not in self._verified:
                digest, block = hashlib.sha256(), memoryview(bytearray(BLOCK))
                with open(path, "rb", buffering=0) as stream:
                    while size := stream.readinto(block):
                        if stopped():
                            raise Stopped
                        digest.update(block[:size])
                if digest.hexdigest() != ref.sha256:
                    raise CorruptShard(ref, f"corrupt: its sha256 is {digest.hexdigest()}, the index says {ref.sha256}")
                self._verified.add(ref)
        except FileNotFoundError:
            raise CorruptShard(ref, "missing") from None
        except OSError as error:
            raise CorruptShard(ref, f"cannot be read ({error.strerror})") from None
        return path

    def _store(self, uri: str) -> Store:
        with self._connecting:
            if uri not in self._stores:
                self._stores[uri] = open_store(uri)
            return self._stores[uri]

    def _open(self) -> tuple[ShardCache, Downloader]:
        with self._opening:
            if self._closed:
                raise Stopped
            self._cache = self._cache or ShardCache(self._folder, self._limit)
            self._downloader = self._downloader or Downloader(self._stats)
            return self._cache, self._downloader

"""Whole shards on local disk, shared by all processes of a machine.

A file `<sha256>.tar` is complete and was verified before it got this name; `<sha256>.fetching` is being filled by the
one process that holds its exclusive lock. Whoever uses a shard holds a shared lock on it. The kernel drops locks with
their process, so a killed one leaves nothing that is taken for in use. All changes of the folder are made under the
exclusive lock of `.lock`, which is held briefly. The folder must be on a local disk: locks on network file systems
differ.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import threading
from collections.abc import Collection, Iterator
from pathlib import Path
from weakref import WeakSet

from shards.errors import UserError
from shards.storage import LOCK

TAR, FETCHING = ".tar", ".fetching"
_OWN = re.compile(r"[0-9a-f]{64}\.(tar|fetching)")


class Busy(Exception):
    """Another fetch of this shard is under way, or just ended."""


class Full(Exception):
    """No room: what could go is in use."""


class Pin:
    """A shard in use: it is not evicted before `release`, or the end of the process.

    Attributes:
        path: of the complete file.
    """

    def __init__(self, path: Path, handle: _Handle) -> None:
        self.path, self._handle = path, handle

    def release(self) -> None:
        self._handle.close()


class ShardCache:
    """A bounded folder of shards.

    Args:
        folder: made where it is missing; files of other names in it are left alone.
        limit: bytes of all shards together, those being fetched included.

    Raises:
        UserError: the folder cannot be written.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        with self._locked():
            self._sweep()
            self._make_room(0, ())

    def take(self, sha256: str, size: int) -> Pin | None:
        """Pin a shard; None where it is not here. A file of another size is no shard and is removed."""
        path = self._path(sha256, TAR)
        with self._locked():
            handle = self._find(path, size)
            if handle is None:
                return None
            # Nobody holds an exclusive lock on it now: that happens under the folder's lock alone.
            handle.lock(fcntl.LOCK_SH)
            return Pin(path, handle)

    def begin(self, sha256: str, size: int, keep: Collection[str] = ()) -> Filling:
        """Reserve the room of a shard and the right to fetch it, as a context.

        Args:
            keep: sha256 of shards that must not go for this one.

        Raises:
            Busy: look again soon.
            Full: what is neither in use nor kept is not enough.
            UserError: the disk is full or the folder cannot be written.
        """
        path = self._path(sha256, FETCHING)
        with self._locked():
            self._sweep()
            if path.exists() or path.with_suffix(TAR).exists():
                raise Busy
            self._make_room(size, keep)
            handle = _Handle(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            handle.lock(fcntl.LOCK_EX)
            try:
                # All of the room now: others see it as taken, and a full disk is an error before a byte is fetched.
                if size:
                    os.posix_fallocate(handle.number, 0, size)
            except BaseException:
                path.unlink(missing_ok=True)
                handle.close()
                raise
            return Filling(self, path, handle)

    def _find(self, path: Path, size: int) -> _Handle | None:
        try:
            handle = _Handle(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        if os.fstat(handle.number).st_size != size:
            handle.close()
            path.unlink()
            return None
        os.utime(handle.number)
        return handle

    def _sweep(self) -> None:
        """Remove what dead processes were filling."""
        for path in self.folder.glob(f"*{FETCHING}"):
            if _OWN.fullmatch(path.name):
                with contextlib.suppress(FileNotFoundError), _Handle(path, os.O_RDWR) as handle:
                    if handle.try_exclusive():
                        path.unlink()

    def _make_room(self, size: int, keep: Collection[str]) -> None:
        """Evict the least recently used shards until `size` bytes fit, or none if they would not fit then either."""
        shards = [(entry.stat(), entry) for entry in os.scandir(self.folder) if _OWN.fullmatch(entry.name)]
        excess = sum(found.st_size for found, _ in shards) + size - self.limit
        with contextlib.ExitStack() as held:
            evicted = []
            for found, entry in sorted(shards, key=lambda shard: shard[0].st_mtime_ns):
                if excess <= 0:
                    break
                name = Path(entry)
                if name.suffix != TAR or name.stem in keep:
                    continue
                if held.enter_context(_Handle(name, os.O_RDONLY)).try_exclusive():
                    evicted.append(name)
                    excess -= found.st_size
            if excess > 0 and size:
                raise Full
            for name in evicted:
                name.unlink()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with self.errors():
            # Also where somebody removed the folder meanwhile.
            self.folder.mkdir(parents=True, exist_ok=True)
            with _Handle(self.folder / LOCK, os.O_RDWR | os.O_CREAT) as handle:
                handle.lock(fcntl.LOCK_EX)
                yield

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Turn errors of the disk into one for the user."""
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                hint = "the disk is full; lower data.cache_bytes or set data.cache to a folder on a larger disk"
            else:
                hint = f"cannot be written ({error.strerror}); set data.cache to a folder of yours"
            raise UserError(f"shard cache {self.folder}: {hint}") from None

    def _path(self, sha256: str, suffix: str) -> Path:
        if not re.fullmatch(r"[0-9a-f]{64}", sha256):
            raise UserError(f"{sha256!r}: no sha256; the index is damaged")
        return self.folder / (sha256 + suffix)


class Filling:
    """A shard being fetched. What is not published when the block ends leaves nothing behind."""

    def __init__(self, cache: ShardCache, path: Path, handle: _Handle) -> None:
        self._cache, self._path, self._handle = cache, path, handle

    def __enter__(self) -> Filling:
        return self

    def __exit__(self, *error: object) -> None:
        # Without its lock and its name at once: nobody sees a file that is neither.
        if self._path.suffix == FETCHING:
            with self._cache._locked():
                self._path.unlink(missing_ok=True)
                self._handle.close()

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Raises UserError: the disk refuses."""
        with self._cache.errors():
            while len(data):
                written = os.pwrite(self._handle.number, data, offset)
                data, offset = memoryview(data)[written:], offset + written

    def read(self, offset: int, size: int) -> bytes:
        """Bytes that were written."""
        with self._cache.errors():
            return os.pread(self._handle.number, size, offset)

    def publish(self) -> Pin:
        """Give the verified bytes their name; they are pinned from then on."""
        with self._cache.errors():
            os.fsync(self._handle.number)
        target = self._path.with_suffix(TAR)
        with self._cache._locked():
            os.utime(self._handle.number)
            os.rename(self._path, target)
            self._path = target
            self._handle.lock(fcntl.LOCK_SH)
        with self._cache.errors():
            folder = os.open(self._cache.folder, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        return Pin(target, self._handle)


class _Handle:
    """An open file whose lock ends with it."""

    def __init__(self, path: Path, flags: int) -> None:
        with _opening:
            self.number = os.open(path, flags, 0o666)
            _handles.add(self)

    def lock(self, kind: int) -> None:
        fcntl.flock(self.number, kind)

    def try_exclusive(self) -> bool:
        """Whether nobody else holds a lock on the file; then this does."""
        try:
            self.lock(fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def __enter__(self) -> _Handle:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        number, self.number = self.number, -1
        if number >= 0:
            os.close(number)


_handles: WeakSet[_Handle] = WeakSet()
_opening = threading.Lock()
"""Held during a fork, so that the child knows all handles."""


def _forget() -> None:
    """In a forked child: its copies of the handles would keep the locks of its parent beyond the parent's end."""
    _opening.release()
    for handle in list(_handles):
        handle.close()


os.register_at_fork(before=_opening.acquire, after_in_parent=_opening.release, after_in_child=_forget)

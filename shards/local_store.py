"""A dataset on disk."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from stat import S_ISREG
from typing import IO, Any, BinaryIO

from shards.storage import LOCK, TEMPORARY, Conflict, Object, StorageError, Store, check_name, local_path, user_cache


class LocalStore(Store):
    """A folder. Publishing is a rename, and a swap is made under a lock that ends with its process."""

    def __init__(self, uri: str) -> None:
        self.root = local_path(uri).absolute()
        self.uri = str(self.root)

    def path(self, name: str) -> Path:
        """Where an object lies.

        Raises:
            UserError: the name leaves the folder.
        """
        return self.root / check_name(name, self.uri)

    def read(self, name: str) -> bytes:
        return self.path(name).read_bytes()

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        found = []
        with open(self.path(name), "rb", buffering=0) as stream:
            for offset, size in ranges:
                data = os.pread(stream.fileno(), size, offset)
                if len(data) != size:
                    raise StorageError(f"{self.uri}/{name}: cut, ends before byte {offset + size}")
                found.append(data)
        return found

    def open(self, name: str) -> BinaryIO:
        return open(self.path(name), "rb")

    def find(self, name: str) -> Object | None:
        try:
            found = os.stat(self.path(name))
        except (FileNotFoundError, NotADirectoryError):
            return None
        # Reading a pipe or a device would wait for ever.
        return _object(name, found) if S_ISREG(found.st_mode) else None

    def list(self, prefix: str = "") -> Iterator[Object]:
        folders = [""]
        while folders:
            folder = folders.pop()
            try:
                entries = list(os.scandir(self.root / folder))
            except FileNotFoundError:
                continue
            for entry in entries:
                name = folder + entry.name
                if entry.is_dir(follow_symlinks=False):
                    # Folders that cannot hold a matching name are not entered.
                    if f"{name}/".startswith(prefix) or prefix.startswith(f"{name}/"):
                        folders.append(f"{name}/")
                elif name.startswith(prefix):
                    # A file may go between the two calls: another process publishes by rename.
                    with contextlib.suppress(FileNotFoundError):
                        found = entry.stat()
                        if S_ISREG(found.st_mode):
                            yield _object(name, found)

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                self.path(name).unlink()

    @contextlib.contextmanager
    def draft(self) -> Iterator[LocalDraft]:
        self.root.mkdir(parents=True, exist_ok=True)
        draft = LocalDraft(self)
        try:
            yield draft
        finally:
            draft.close()

    def read_version(self, name: str) -> tuple[bytes, Any] | None:
        try:
            data = self.read(name)
        except FileNotFoundError:
            return None
        return data, hashlib.sha256(data).hexdigest()

    def swap(self, name: str, data: bytes, version: Any | None) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        with open(self.root / LOCK, "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = self.read_version(name)
            if (found[1] if found else None) != version:
                raise Conflict(name)
            self.write(name, data)


class LocalDraft:
    """A file without a name, so that even a killed process leaves nothing. File systems that cannot do that (NFS) get
    a hidden file, which a killed process leaves for `gc`."""

    def __init__(self, store: LocalStore) -> None:
        self._store = store
        self._hidden: Path | None = None
        try:
            handle = os.open(store.root, os.O_TMPFILE | os.O_RDWR, 0o666)
        except (OSError, AttributeError):
            handle, name = tempfile.mkstemp(prefix=TEMPORARY, dir=store.root)
            os.fchmod(handle, 0o666 & ~_umask())
            self._hidden = Path(name)
        self.stream: IO[bytes] = os.fdopen(handle, "w+b")

    def publish(self, name: str) -> None:
        """Give the file its name, in place of what had it before."""
        target = self._store.path(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        self.stream.flush()
        os.fsync(self.stream.fileno())
        if self._hidden is None:
            self._hidden = self._store.root / f"{TEMPORARY}{os.urandom(8).hex()}"
            # The folder handle makes Python call linkat, which follows the link to the nameless file.
            here = os.open(self._store.root, os.O_RDONLY)
            try:
                source = f"/proc/self/fd/{self.stream.fileno()}"
                os.link(source, self._hidden, src_dir_fd=here, follow_symlinks=True)
            finally:
                os.close(here)
        os.replace(self._hidden, target)
        self._hidden = None

    def close(self) -> None:
        self.stream.close()
        if self._hidden is not None:
            self._hidden.unlink(missing_ok=True)


def local_copy(store: Store, name: str) -> Path:
    """Path of an immutable object: its own on disk, or a copy in the user's cache. Raises FileNotFoundError."""
    if isinstance(store, LocalStore):
        return store.path(name)
    found = store.find(name)
    if found is None:
        raise FileNotFoundError(f"{store.uri}/{name}")
    cache = LocalStore(str(user_cache()))
    key = hashlib.sha256(f"{store.uri}/{name} {found.stamp}".encode()).hexdigest()[:16]
    copy = f"objects/{key}-{name.rpartition('/')[2]}"
    if not cache.exists(copy):
        cache.write(copy, store.read(name))
    return cache.path(copy)


def _object(name: str, stat: os.stat_result) -> Object:
    return Object(name, stat.st_size, datetime.fromtimestamp(stat.st_mtime, timezone.utc), str(stat.st_mtime_ns))


def _umask() -> int:
    current = os.umask(0o022)
    os.umask(current)
    return current

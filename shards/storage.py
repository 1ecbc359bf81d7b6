"""Where a dataset lies: a folder on disk, or a prefix in a bucket. Objects appear whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from stat import S_ISREG
from typing import IO, Any, BinaryIO, Protocol

from shards.errors import UserError

TEMPORARY = ".writing-"
"""Start of the name of an object that is being written, on file systems that cannot keep it nameless."""
LOCK = ".lock"
BLOCK = 1 << 20


class Conflict(Exception):
    """The object is no longer the version that was to be replaced."""


class StorageError(UserError):
    """Storage refused or failed: access denied, not reachable after all retries, an object shorter than it was."""


@dataclass(frozen=True)
class Object:
    """A stored object: name relative to the store, size in bytes, time of its last change (UTC), and a stamp that
    changes with its content (modification time on disk, entity tag in a bucket)."""

    name: str
    size: int
    modified: datetime
    stamp: str


class Draft(Protocol):
    """Bytes on their way to becoming an object; what is not published leaves nothing behind."""

    stream: IO[bytes]

    def publish(self, name: str) -> None:
        """Make the bytes written so far the object `name`."""


class Store(ABC):
    """Named objects below a URI. Names are relative, with forward slashes.

    Attributes:
        uri: without a slash at its end.
    """

    uri: str

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError."""

    @abstractmethod
    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Bytes of each (offset, size).

        Raises:
            FileNotFoundError: no such object.
            StorageError: the object ends before a range does.
        """

    @abstractmethod
    def open(self, name: str) -> BinaryIO:
        """Seekable stream of an object's bytes. Raises FileNotFoundError."""

    @abstractmethod
    def find(self, name: str) -> Object | None:
        """The object of this name, if there is one."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[Object]:
        """All objects whose name starts with `prefix`, in no order; none where the folder does not exist."""

    @abstractmethod
    def delete(self, names: Iterable[str]) -> None:
        """Remove objects; ones that are not there are no error."""

    @abstractmethod
    def draft(self) -> contextlib.AbstractContextManager[Draft]:
        """A stream to write to; nothing is visible before `publish`, and nothing is left when the block ends."""

    @abstractmethod
    def read_version(self, name: str) -> tuple[bytes, Any] | None:
        """An object with a token of its version; None where there is none."""

    @abstractmethod
    def swap(self, name: str, data: bytes, version: Any | None) -> None:
        """Replace the object only if it still is `version` (None: only if there is none yet).

        Raises:
            Conflict: it is another one by now.
        """

    def exists(self, name: str) -> bool:
        return self.find(name) is not None

    def write(self, name: str, data: bytes) -> None:
        with self.draft() as draft:
            draft.stream.write(data)
            draft.publish(name)

    def sha256(self, name: str) -> str:
        """Digest of an object's bytes, hex. Raises FileNotFoundError."""
        with self.open(name) as stream:
            return stream_sha256(stream)


def open_store(uri: str) -> Store:
    """The store at a path, `file://`, `s3://bucket/prefix` or `gs://bucket/prefix`.

    Raises:
        UserError: another scheme, no bucket, or a URI that carries credentials.
    """
    if is_remote(uri):
        from shards.object_store import ObjectStore

        return ObjectStore(uri)
    return LocalStore(uri)


def open_uri(uri: str) -> tuple[Store, str]:
    """(store, name) of a single object, for example one media file."""
    if is_remote(uri):
        folder, _, name = uri.rpartition("/")
        return open_store(folder), name
    path = local_path(uri)
    return LocalStore(str(path.parent)), path.name


def is_readable(uri: str) -> bool:
    """Whether the object of a URI can be opened. Raises StorageError: its bucket refuses or does not answer."""
    if is_remote(uri):
        store, name = open_uri(uri)
        return store.exists(name)
    return os.access(local_path(uri), os.R_OK)


def is_remote(uri: str) -> bool:
    """Whether a URI names a bucket, as opposed to a local path.

    Raises:
        UserError: a scheme that no storage serves.
    """
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", uri)
    if not match or match[1] == "file":
        return False
    if match[1] not in ("s3", "gs"):
        # The rest stays unsaid: it may hold a password.
        raise UserError(f"{match[1]}://...: no such storage; use a path, s3:// or gs://")
    return True


def local_path(uri: str) -> Path:
    """Path of a local `uri` (plain path or `file://`).

    Raises:
        UserError: the URI names a bucket.
    """
    if is_remote(uri):
        raise UserError(f"{uri.partition('://')[0]}://...: a local path is needed here")
    return Path(uri.removeprefix("file://"))


def check_name(name: str, uri: str) -> str:
    """`name`, if it stays inside its store.

    Raises:
        UserError: it does not.
    """
    if name.startswith("/") or "\0" in name or not {"", ".", ".."}.isdisjoint(name.split("/")):
        raise UserError(f"{name!r}: unsafe object name in {uri}")
    return name


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
                        yield _object(name, entry.stat())

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            with contextlib.suppress(FileNotFoundError):
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
    cache = LocalStore(os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache"))
    key = hashlib.sha256(f"{store.uri}/{name} {found.stamp}".encode()).hexdigest()[:16]
    copy = f"faces2voices/objects/{key}-{name.rpartition('/')[2]}"
    if not cache.exists(copy):
        cache.write(copy, store.read(name))
    return cache.path(copy)


def stream_sha256(stream: IO[bytes]) -> str:
    """sha256 of the rest of a stream, hex."""
    digest = hashlib.sha256()
    while block := stream.read(BLOCK):
        digest.update(block)
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, hex."""
    with open(path, "rb") as stream:
        return stream_sha256(stream)


def _object(name: str, stat: os.stat_result) -> Object:
    return Object(name, stat.st_size, datetime.fromtimestamp(stat.st_mtime, timezone.utc), str(stat.st_mtime_ns))


def _umask() -> int:
    current = os.umask(0o022)
    os.umask(current)
    return current

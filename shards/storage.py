"""Where a dataset lies: a folder on disk, a prefix in a bucket, or a folder of a web server that is only read. Objects
appear whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
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
    """The store at a path, `file://`, `s3://bucket/prefix`, `gs://bucket/prefix` or `https://host/path` (read only).

    Raises:
        UserError: another scheme, no bucket, or a URI that carries credentials.
    """
    if is_web(uri):
        from shards.http_store import HttpStore

        return HttpStore(uri)
    if is_remote(uri):
        from shards.object_store import ObjectStore

        return ObjectStore(uri)
    from shards.local_store import LocalStore

    return LocalStore(uri)


def open_uri(uri: str) -> tuple[Store, str]:
    """(store, name) of a single object, for example one media file."""
    if is_web(uri):
        from shards.http_store import split_url

        folder, name = split_url(uri)
        return open_store(folder), name
    if is_remote(uri):
        # Names of files may have characters that would be a query elsewhere; a signature in one is a credential.
        if re.search(r"[?&](X-Amz-|X-Goog-|Signature=|AWSAccessKeyId=)", uri, re.IGNORECASE):
            raise UserError(f"{uri.partition('?')[0]}?...: a signed URI is a credential; give s3://bucket/name")
        scheme, _, rest = uri.partition("://")
        bucket, _, name = rest.partition("/")
        return open_store(f"{scheme}://{bucket}"), name
    path = local_path(uri)
    return open_store(str(path.parent)), path.name


def is_readable(uri: str) -> bool:
    """Whether the object of a URI can be opened. Raises StorageError: its bucket refuses or does not answer."""
    if is_remote(uri):
        store, name = open_uri(uri)
        return store.exists(name)
    return os.access(local_path(uri), os.R_OK)


def is_remote(uri: str) -> bool:
    """Whether a URI names a bucket or a web server, as opposed to a local path.

    Raises:
        UserError: a scheme that no storage serves.
    """
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", uri)
    if not match or match[1] == "file":
        return False
    if match[1] not in ("s3", "gs", "http", "https"):
        # The rest stays unsaid: it may hold a password.
        raise UserError(f"{match[1]}://...: no such storage; use a path, s3://, gs:// or https://")
    return True


def is_web(uri: str) -> bool:
    """Whether a URI names a web server, which can only be read."""
    return uri.startswith(("http://", "https://"))


def local_path(uri: str) -> Path:
    """Path of a local `uri` (plain path or `file://`).

    Raises:
        UserError: the URI is remote.
    """
    if is_remote(uri):
        raise UserError(f"{uri.partition('://')[0]}://...: a local path is needed here")
    return Path(uri.removeprefix("file://"))


def user_cache() -> Path:
    """This program's folder in the user's cache; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "faces2voices")


def check_name(name: str, uri: str) -> str:
    """`name`, if it stays inside its store.

    Raises:
        UserError: it does not.
    """
    if name.startswith("/") or "\0" in name or not {"", ".", ".."}.isdisjoint(name.split("/")):
        raise UserError(f"{name!r}: unsafe object name in {uri}")
    return name


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

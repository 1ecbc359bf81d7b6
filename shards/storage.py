"""Where a dataset lies. Objects appear whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from shards.errors import UserError


def local_path(uri: str) -> Path:
    """Path of a local `uri` (plain path or `file://`).

    Raises:
        UserError: another scheme.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return Path(uri)
    if scheme == "file":
        return Path(rest)
    raise UserError(f"{uri}: storage {scheme}:// is not supported; give a local path")


class Store:
    """A folder of named objects.

    Names are relative with forward slashes. Writing publishes by rename: a reader sees the old object or the new.
    """

    def __init__(self, uri: str) -> None:
        self.root = local_path(uri)

    def path(self, name: str) -> Path:
        """Local path of an object.

        Raises:
            UserError: the name leaves the folder.
        """
        parts = name.split("/")
        if name.startswith("/") or ".." in parts or "" in parts:
            raise UserError(f"{name!r}: unsafe object name in {self.root}")
        return self.root / name

    def exists(self, name: str) -> bool:
        return self.path(name).is_file()

    def read(self, name: str) -> bytes:
        return self.path(name).read_bytes()

    def size(self, name: str) -> int | None:
        """Bytes of an object, None where there is none."""
        return self.path(name).stat().st_size if self.exists(name) else None

    def write(self, name: str, data: bytes) -> None:
        with self.writer(name) as stream:
            stream.write(data)

    @contextlib.contextmanager
    def writer(self, name: str) -> Iterator[BinaryIO]:
        """Stream that becomes the object `name` when the block ends; an exception inside publishes nothing."""
        target = self.path(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=".writing-", dir=target.parent)
        try:
            with os.fdopen(handle, "wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            # mkstemp makes private files; objects are as readable as any other file of the user.
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise

    def sha256(self, name: str) -> str:
        """Digest of an object's bytes, hex."""
        return file_sha256(self.path(name))


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _umask() -> int:
    current = os.umask(0o022)
    os.umask(current)
    return current

"""Deterministic tar files: sorted members, no clock, no owner; the same members give the same bytes.

Reading trusts nothing: names, types and sizes are checked, and an archive without its end marker is an error, since a
tar that is cut between two members looks complete to an ordinary reader.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO

BLOCK = tarfile.BLOCKSIZE
END = bytes(2 * BLOCK)
MAX_MEMBER = 1 << 31
"""Largest member accepted, bytes."""
MAX_NAME = 100
"""Longest member name; longer ones would need extension headers that differ between writers."""


class TarError(ValueError):
    """The archive is cut, damaged or holds something other than plain files."""


@dataclass(frozen=True)
class Member:
    """Where a member's data lies in the archive: byte `offset` and `size`."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class Written:
    """What `write_tar` wrote."""

    members: list[Member]
    bytes: int
    sha256: str


def write_tar(stream: IO[bytes], members: Iterable[tuple[str, bytes]]) -> Written:
    """Write `members` (name, data) in the order given.

    Raises:
        TarError: a name is longer than `MAX_NAME` bytes or not ASCII.
    """
    digest = hashlib.sha256()
    written: list[Member] = []
    position = 0

    def put(data: bytes) -> None:
        nonlocal position
        stream.write(data)
        digest.update(data)
        position += len(data)

    for name, data in members:
        if not name.isascii() or len(name) > MAX_NAME:
            raise TarError(f"{name}: member names are ASCII of at most {MAX_NAME} characters")
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(data), 0o644
        put(info.tobuf(tarfile.USTAR_FORMAT))
        written.append(Member(name, position, len(data)))
        put(data)
        put(bytes(-len(data) % BLOCK))
    put(END)
    return Written(written, position, digest.hexdigest())


def read_tar(stream: IO[bytes]) -> Iterator[tuple[Member, bytes]]:
    """Yield every member with its data, front to back.

    Raises:
        TarError: cut or damaged archive, no end marker, a member that is no plain file, an unsafe name, a size beyond
            `MAX_MEMBER`.
    """
    position = 0
    while True:
        header = stream.read(BLOCK)
        if header == bytes(BLOCK):
            if stream.read(BLOCK) != bytes(BLOCK):
                raise TarError(f"byte {position}: end marker is cut")
            if stream.read(1):
                raise TarError(f"byte {position + 2 * BLOCK}: data after the end marker")
            return
        if len(header) < BLOCK:
            raise TarError(f"byte {position}: archive ends without an end marker")
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
        except (tarfile.TarError, UnicodeDecodeError) as error:
            raise TarError(f"byte {position}: damaged header ({error})") from None
        _check(info, position)
        data = stream.read(info.size)
        padding = -info.size % BLOCK
        if len(data) < info.size or len(stream.read(padding)) < padding:
            raise TarError(f"{info.name}: data is cut at byte {position + BLOCK + len(data)}")
        yield Member(info.name, position + BLOCK, info.size), data
        position += BLOCK + info.size + padding


def _check(info: tarfile.TarInfo, position: int) -> None:
    if info.type != tarfile.REGTYPE:
        raise TarError(f"byte {position}: {info.name!r} is no plain file")
    parts = info.name.split("/")
    if not info.name or ".." in parts or "" in parts or "\0" in info.name:
        raise TarError(f"byte {position}: unsafe member name {info.name!r}")
    if not 0 <= info.size <= MAX_MEMBER:
        raise TarError(f"byte {position}: {info.name!r} claims {info.size} bytes")

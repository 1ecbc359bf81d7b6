"""The bytes of a checkpoint file, read as if a stranger had written them."""

from __future__ import annotations

import contextlib
import pickle
import re
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any

import torch

from shards.errors import UserError
from shards.storage import StorageError, Store, is_remote, is_web

PART = 8 << 20
DOWNLOADS = 8
"""Parts of an object on their way at once."""


class Unreadable(UserError):
    """A file that is no whole checkpoint of this program."""


def read_state(store: Store, name: str, address: str) -> Any:
    """What `torch.save` wrote into a file, with its tensors on the CPU; no code in it is run.

    Every byte is checked against the checksums in the file: torch itself does not, and would go on from a file with a
    hole in it.

    Args:
        address: what errors call the file.

    Raises:
        FileNotFoundError: no such file.
        Unreadable: it is cut short, damaged or of another kind.
        StorageError: the storage refuses or does not answer.
    """
    with _opened(store, name, address) as stream:
        _check_whole(stream, address)
        return _unpickle(stream, address)


@contextlib.contextmanager
def _opened(store: Store, name: str, address: str) -> Iterator[IO[bytes]]:
    """A stream of the file's bytes on disk; a nameless copy of an object, so that memory holds its tensors alone."""
    if not is_remote(store.uri):
        with store.open(name) as stream:
            yield stream
        return
    with tempfile.TemporaryFile() as copy:
        _download(store, name, copy, address)
        yield copy


def _download(store: Store, name: str, copy: IO[bytes], address: str) -> None:
    begin = store.find(name)
    if begin is None:
        raise FileNotFoundError(address)
    size, lock = begin.size, threading.Lock()

    def fetch(offset: int) -> None:
        data = store.read_ranges(name, [(offset, min(PART, size - offset))])[0]
        try:
            with lock:
                copy.seek(offset)
                copy.write(data)
        except OSError as error:
            raise StorageError(f"{address}: no copy in {tempfile.gettempdir()} ({error.strerror})") from None

    with ThreadPoolExecutor(DOWNLOADS) as pool:
        for _ in pool.map(fetch, range(0, size, PART)):
            pass
    copy.seek(0)
    end = store.find(name)
    # Not every web server stamps its files; there the checksums alone tell.
    if not is_web(store.uri) and (end is None or end.stamp != begin.stamp):
        raise StorageError(f"{address}: was replaced while it was read; run the same command again")


def _check_whole(stream: IO[bytes], address: str) -> None:
    begins = stream.read(4) == b"PK\x03\x04"
    if not begins:
        # An archive may have anything in front of it, and torch looks there first, with a reader that checks nothing.
        raise Unreadable(f"{address}: not a checkpoint of this program")
    try:
        archive = zipfile.ZipFile(stream)
        begins = False
        # torch never compresses; a compressed file could unpack to any size.
        packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
        broken = None if packed else archive.testzip()
    except (OSError, MemoryError):
        raise
    except Exception as error:
        if begins:
            size = stream.seek(0, 2)
            raise Unreadable(f"{address}: cut short, its end is missing after {size} bytes; copy it again") from None
        raise Unreadable(f"{address}: not a checkpoint of this program ({one_line(error)})") from None
    if packed:
        raise Unreadable(f"{address}: not a checkpoint of this program (a compressed file)")
    if broken is not None:
        raise Unreadable(f"{address}: damaged, the checksum of {broken} is wrong; copy it again")
    stream.seek(0)


def _unpickle(stream: IO[bytes], address: str) -> Any:
    try:
        return torch.load(stream, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except pickle.UnpicklingError as error:
        # torch's own text goes on to say how code in the file could be run.
        code = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it holds code, {code[1]}, which is not run" if code else "it is not plain tensors"
        raise Unreadable(f"{address}: not a checkpoint of this program ({what})") from None
    except Exception as error:
        raise Unreadable(f"{address}: not a checkpoint of this program ({one_line(error)})") from None


def one_line(error: Exception) -> str:
    """Kind and text of an error, short and on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"

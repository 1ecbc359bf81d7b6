"""Content digests of source media: each file is read once, and again only when its size or stamp changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from typing import TypeVar

from pipeline.stage import Clip
from shards.dataset import ClipRow
from shards.progress import Progress
from shards.storage import Object, is_remote, open_uri

Known = Mapping[tuple[str, int, str], str]
"""(uri, size, stamp) -> digest."""
T = TypeVar("T")
_UNREADABLE = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
Facts = tuple[int, str, str]
"""Size, stamp and sha256 of a file; of one that cannot be read: 0 and twice nothing."""
Files = Sequence[tuple[str, Object]]
"""URIs, each with its size and stamp."""
Read = Callable[[Files], Iterator[tuple[str, Facts]]]
"""Reads files whole and gives URI and facts of each, in any order."""


def known_digests(rows: Iterable[ClipRow | Clip]) -> Known:
    """What a clip table, or a source that was read before, says of its media."""
    return {(row.uri, row.bytes, row.stamp): row.digest for row in rows if row.digest}


def with_digests(
    clips: Sequence[Clip], objects: Mapping[str, Object], known: Known, read: Read | None = None
) -> list[Clip]:
    """Fill in size, stamp and sha256 of each clip's media. A file that cannot be read gets none and is refused by the
    first stage that opens it.

    Args:
        objects: uri -> what a listing of the source said of it; files that are not in it are looked up.
        read: reads the files that are not known; None for threads of this process.

    Raises:
        StorageError: a bucket refuses or does not answer.
        OSError: a disk does not work.
    """
    uris = sorted({clip.uri for clip in clips})
    facts: dict[str, Facts] = {}
    new: list[tuple[str, Object]] = []
    with Progress("read source", len(uris), "files") as progress:
        seen: dict[str, Object | None] = {uri: objects.get(uri) for uri in uris}
        seen.update(_in_threads([uri for uri, found in seen.items() if found is None], _find))
        for uri, found in seen.items():
            digest = known.get((uri, found.size, found.stamp)) if found else ""
            if found and not digest:
                new.append((uri, found))
            else:
                facts[uri] = (found.size, found.stamp, digest or "") if found else (0, "", "")
                progress.advance()
        for uri, fact in (read or read_here)(new):
            facts[uri] = fact
            progress.advance()
    return [
        replace(clip, bytes=facts[clip.uri][0], stamp=facts[clip.uri][1], digest=facts[clip.uri][2]) for clip in clips
    ]


def read_here(files: Files) -> Iterator[tuple[str, Facts]]:
    """Read files by threads of this process."""
    listed = dict(files)
    return _in_threads(list(listed), lambda uri: _facts(uri, listed[uri]))


def _in_threads(uris: Sequence[str], work: Callable[[str], T]) -> Iterator[tuple[str, T]]:
    # Buckets answer slowly and in parallel, disks neither.
    pool = ThreadPoolExecutor(max_workers=32 if any(map(is_remote, uris)) else 4)
    try:
        calls = {pool.submit(work, uri): uri for uri in uris}
        for call in as_completed(calls):
            yield calls[call], call.result()
    finally:
        # After Ctrl-C, files that wait their turn are not read any more.
        pool.shutdown(cancel_futures=True)


def _find(uri: str) -> Object | None:
    store, name = open_uri(uri)
    try:
        return store.find(name)
    except _UNREADABLE:
        return None


def _facts(uri: str, found: Object) -> Facts:
    store, name = open_uri(uri)
    try:
        return found.size, found.stamp, store.sha256(name)
    except _UNREADABLE:
        return 0, "", ""

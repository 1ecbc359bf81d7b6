"""Content digests of source media: each file is read once, and again only when its size or stamp changes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace

from pipeline.stage import Clip
from shards.dataset import ClipRow
from shards.progress import Progress
from shards.storage import Object, is_remote, open_uri

Known = Mapping[tuple[str, int, str], str]
"""(uri, size, stamp) -> digest."""
Facts = tuple[int, str, str]
"""Size, stamp and sha256 of a file; of one that cannot be read: 0 and twice nothing."""


@dataclass(frozen=True)
class File:
    """A file to be read: what a listing said of it, if one did; and its digests, by size and stamp, as known."""

    uri: str
    found: Object | None
    known: Mapping[tuple[int, str], str]


Read = Callable[[Sequence[File]], Iterator[tuple[str, Facts]]]
"""Reads files whole, unless they are known, and gives URI and facts of each, in any order."""


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
    by_uri: dict[str, dict[tuple[int, str], str]] = defaultdict(dict)
    for (uri, size, stamp), digest in known.items():
        by_uri[uri][size, stamp] = digest
    unknown: list[File] = []
    for uri in uris:
        found = objects.get(uri)
        seen = known.get((uri, found.size, found.stamp)) if found else None
        if found and seen:
            facts[uri] = found.size, found.stamp, seen
        else:
            unknown.append(File(uri, found, by_uri.get(uri, {})))
    with Progress("read source", len(uris), "files") as progress:
        progress.advance(len(facts))
        for uri, fact in (read or read_here)(unknown):
            facts[uri] = fact
            progress.advance()
    return [
        replace(clip, bytes=facts[clip.uri][0], stamp=facts[clip.uri][1], digest=facts[clip.uri][2]) for clip in clips
    ]


def read_here(files: Sequence[File]) -> Iterator[tuple[str, Facts]]:
    """Read files by threads of this process."""
    # Buckets answer slowly and in parallel, disks neither.
    pool = ThreadPoolExecutor(max_workers=32 if any(is_remote(file.uri) for file in files) else 4)
    try:
        calls = {pool.submit(_facts, file): file.uri for file in files}
        for call in as_completed(calls):
            yield calls[call], call.result()
    finally:
        # After Ctrl-C, files that wait their turn are not read any more.
        pool.shutdown(cancel_futures=True)


def _facts(file: File) -> Facts:
    store, name = open_uri(file.uri)
    try:
        found = file.found or store.find(name)
        if found is None:
            return 0, "", ""
        return found.size, found.stamp, file.known.get((found.size, found.stamp)) or store.sha256(name)
    except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError):
        return 0, "", ""

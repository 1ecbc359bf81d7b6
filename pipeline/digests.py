"""Content digests of source media: each file is read once, and again only when its size or stamp changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace

from pipeline.stage import Clip
from shards.dataset import ClipRow
from shards.progress import Progress
from shards.storage import Object, is_remote, open_uri

Known = Mapping[tuple[str, int, str], str]
"""(uri, size, stamp) -> digest."""


def known_digests(rows: Iterable[ClipRow | Clip]) -> Known:
    """What a clip table, or a source that was read before, says of its media."""
    return {(row.uri, row.bytes, row.stamp): row.digest for row in rows if row.digest}


def with_digests(clips: Sequence[Clip], objects: Mapping[str, Object], known: Known) -> list[Clip]:
    """Fill in size, stamp and sha256 of each clip's media. A file that cannot be read gets none and is refused by the
    first stage that opens it.

    Args:
        objects: uri -> what a listing of the source said of it; files that are not in it are looked up.

    Raises:
        StorageError: a bucket refuses or does not answer.
        OSError: a disk does not work.
    """
    uris = sorted({clip.uri for clip in clips})
    facts: dict[str, tuple[int, str, str]] = {}
    # Buckets answer slowly and in parallel, disks neither.
    workers = 32 if any(map(is_remote, uris)) else 4
    pool = ThreadPoolExecutor(max_workers=workers)
    try:
        calls = {pool.submit(_facts, uri, objects.get(uri), known): uri for uri in uris}
        with Progress("read source", len(uris), "files") as progress:
            for call in as_completed(calls):
                facts[calls[call]] = call.result()
                progress.advance()
    finally:
        # After Ctrl-C, files that wait their turn are not read any more.
        pool.shutdown(cancel_futures=True)
    return [
        replace(clip, bytes=facts[clip.uri][0], stamp=facts[clip.uri][1], digest=facts[clip.uri][2]) for clip in clips
    ]


def _facts(uri: str, found: Object | None, known: Known) -> tuple[int, str, str]:
    store, name = open_uri(uri)
    try:
        found = found or store.find(name)
        if found is None:
            return 0, "", ""
        digest = known.get((uri, found.size, found.stamp)) or store.sha256(name)
        return found.size, found.stamp, digest
    except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError):
        return 0, "", ""

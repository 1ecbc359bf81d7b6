"""Which videos are to be spoken for, and under which names: a folder, a table, or a plain list of paths."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from pipeline.digests import with_digests
from pipeline.sources import SourceConfig, list_clips
from pipeline.stage import Clip
from pipeline.tree import MEDIA, Tree
from shards.errors import UserError
from shards.storage import is_remote, local_path

LISTS = (".txt", ".csv", ".parquet", ".pq")


def is_many(source: str) -> bool:
    """Whether a source is a folder or a list, and not one video."""
    suffix = PurePosixPath(source).suffix.lower()
    if is_remote(source):
        return suffix not in MEDIA
    return suffix in LISTS or Path(source).is_dir()


def list_videos(source: str) -> dict[str, Clip]:
    """Key -> clip with the digest of its media, in the order of keys. A key is the path of what is written, without
    its ending.

    Args:
        source: a folder, of which every video counts, by its relative path; a table, CSV or Parquet, as in
            `pipeline.sources.list_clips`, by its `key`, or its `uri` where it has none; or a `.txt` with a path on
            each line, relative to it, by the path below the folder that all lie in.

    Raises:
        UserError: nothing there, a malformed list, two clips with one key, or a key that leads out of the output.
    """
    suffix = PurePosixPath(source).suffix.lower()
    if suffix == ".txt":
        keyed = _plain_list(source)
    elif suffix in LISTS:
        keyed = [(unquote(clip.key), clip) for clip in list_clips(source, SourceConfig(layout="table")).clips]
    else:
        tree = Tree(source)
        keyed = [(str(PurePosixPath(name).with_suffix("")), _clip(tree.uri(name))) for name in tree.media()]
    if not keyed:
        raise UserError(f"source {source}: no videos found (endings {' '.join(sorted(MEDIA))})")
    seen: dict[str, Clip] = {}
    for key, clip in sorted(keyed, key=lambda pair: pair[0]):
        if key in seen:
            raise UserError(f"{seen[key].uri} and {clip.uri} would both be written as {key!r}; rename one")
        if key.startswith("/") or {".", ".."} & {*key.split("/")} or "\0" in key:
            raise UserError(f"key {key!r}: leads out of the output folder; give another in the table")
        seen[key] = clip
    whole = [clip for clip in seen.values() if not clip.digest]
    digests = {clip.uri: clip for clip in with_digests(whole, {}, {})} if whole else {}
    return {key: digests.get(clip.uri, clip) for key, clip in seen.items()}


def check_output(source: str, output: Path) -> None:
    """Raises UserError: `output` cannot be the folder for the speech of many videos."""
    if output.suffix.lower() in (".wav", ".mp4") or output.is_file():
        raise UserError(f"{output}: {source} may hold many videos; name a folder for the output")
    if is_remote(source) or not Path(source).is_dir():
        return
    inside, outside = output.resolve(), Path(source).resolve()
    if inside == outside or outside in inside.parents:
        raise UserError(f"{output}: lies in the source folder, where the next run would take speech for a source")


def local_sources(clips: Mapping[str, Clip]) -> set[Path]:
    """Resolved paths of the sources that are files here."""
    return {local_path(clip.uri).resolve() for clip in clips.values() if not is_remote(clip.uri)}


def check_sources_stay(clips: Mapping[str, Clip], output: Path, suffixes: Iterable[str]) -> None:
    """Raises UserError: what is written for a key, `output / KEY` with one of `suffixes`, would replace a source."""
    sources = local_sources(clips)
    for key in clips:
        for suffix in suffixes:
            path = output / f"{key}{suffix}"
            if path.resolve() in sources:
                raise UserError(f"{path}: is a source, which speech would replace; name another output folder")


def _plain_list(source: str) -> list[tuple[str, Clip]]:
    if is_remote(source):
        raise UserError(f"source {source}: a list of paths must be a local file; give a table with the column uri")
    path = local_path(source).absolute()
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"source {source}: cannot be read as a list of paths ({error})") from None
    if any(map(is_remote, lines)):
        raise UserError(f"source {source}: holds more than paths; videos in buckets go into a table")
    videos = [os.path.normpath(path.parent / line) for line in lines if line and not line.startswith("#")]
    if not videos:
        return []
    root = os.path.commonpath([os.path.dirname(video) for video in videos])
    return [(str(PurePosixPath(os.path.relpath(video, root)).with_suffix("")), _clip(video)) for video in videos]


def _clip(uri: str) -> Clip:
    return Clip(key="", uri=uri, digest="")

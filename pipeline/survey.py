"""What is there before a build: the dataset, the source's clips and the shards they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.assign import assign_shards
from pipeline.codebook import find_given
from pipeline.config import BuildConfig
from pipeline.digests import Known, known_digests
from pipeline.recordings import Cut, Scan, SegmentTask, cut_recordings, recording_of
from pipeline.sources import list_clips
from pipeline.stage import Clip
from pipeline.words import count
from shards.config import load_config
from shards.dataset import ClipRow, Dataset
from shards.errors import UserError
from shards.manifest import MANIFEST, OWN, Manifest
from shards.storage import is_remote, local_path

if TYPE_CHECKING:
    from pipeline.work import Site


@dataclass(frozen=True)
class Wanted:
    """Settings as the user gives them. A file is the whole truth; without one, a dataset goes on with its own.

    Attributes:
        path: YAML file.
        overrides: `a.b=value`, over the file or over the dataset's own settings.
    """

    path: Path | None = None
    overrides: tuple[str, ...] = ()

    def config(self, manifest: Manifest | None) -> BuildConfig:
        """The settings for a dataset in this state. Raises UserError: an unknown key or a wrong type."""
        own = manifest.config if manifest and self.path is None else None
        return load_config(BuildConfig, self.path, self.overrides, base=own)


@dataclass(frozen=True)
class Survey:
    """The state that a plan starts from.

    Attributes:
        manifest, version: of the dataset; None before its first commit.
        rows: its clip table.
        config: the settings to build with.
        source: URI that the clips come from.
        shards: shard -> clips of the source, ordered by key.
        gone: keys in the dataset that the source no longer has, or whose media it can no longer read.
        recut: those of them whose recordings are there and cut otherwise now.
        unsure: keys in the dataset that may be gone when the recordings to be looked through have been.
        sizes: name -> size of every stored object.
        recordings: what the source has, with digests; its clips, unless these are cut from it.
        scans: name -> task and recording, for what has to be looked through before its clips are known.
        notes: lines for the user.
    """

    dataset: Dataset
    manifest: Manifest | None
    version: Any
    rows: list[ClipRow]
    config: BuildConfig
    source: str
    shards: dict[str, list[Clip]]
    gone: list[str]
    recut: list[str]
    unsure: list[str]
    sizes: dict[str, int]
    recordings: list[Clip]
    scans: dict[str, tuple[SegmentTask, Clip]]
    notes: list[str] = field(default_factory=list)


def _was_cut(manifest: Manifest | None) -> bool:
    return bool(manifest and manifest.config.get("segment", {}).get("enabled"))


def cut_words(there: Survey) -> str:
    """How recordings are cut, against how they were when the dataset was built."""
    before = _was_cut(there.manifest)
    if before == there.config.segment.enabled:
        return "cut otherwise now"
    return "not cut any more, but were (--segment)" if before else "cut now (--segment), but were not"


def survey(
    source: str | None,
    uri: str,
    wanted: BuildConfig | Wanted,
    known: Known | None = None,
    failed: Mapping[str, Scan] | None = None,
    site: Site | None = None,
) -> Survey:
    """Look at the dataset at `uri` and at its source; nothing is written.

    Args:
        source: where the clips are; None for where the dataset's last build found them.
        wanted: settings, whole or as the user gives them.
        known: digests of media that need not be read again, besides those in the dataset.
        failed: what was found in recordings and is not stored, by task.
        site: whose machines read media for their digests; None for this process.

    Raises:
        UserError: unusable source, a dataset of another profile or schema, a folder that holds something else.
    """
    dataset = Dataset(uri)
    if not is_remote(uri) and local_path(uri).exists() and not local_path(uri).is_dir():
        raise UserError(f"{uri}: is a file; name a folder for the dataset: f2v build SOURCE DATASET")
    manifest, version = dataset.current()
    config = find_given(dataset, manifest, wanted.config(manifest) if isinstance(wanted, Wanted) else wanted)
    sizes = {found.name: found.size for found in dataset.store.list()}
    if manifest is None:
        foreign = sorted(name for name in sizes if not OWN.fullmatch(name))
        if foreign:
            own = f" for the dataset: f2v build {uri} DATASET" if source is None else ""
            raise UserError(f"{uri}: holds other files ({foreign[0]} ...); name a new or empty folder{own}")
    elif manifest.profile != config.profile:
        raise UserError(
            f"{uri}: built with profile {manifest.profile}, not {config.profile}, and a dataset has one; use a new "
            f"folder, or profile {manifest.profile}"
        )
    if source is None:
        if manifest is None:
            raise UserError(f"{uri}: no dataset here ({MANIFEST} is missing); name a source: f2v build SOURCE {uri}")
        source = manifest.source
    rows = dataset.clips(manifest) if manifest else []
    read = site.reader(config) if site else None
    found = list_clips(source, config.source, {**known_digests(rows), **(known or {})}, read)
    cut = Cut(found.clips, {}, [])
    if config.segment.enabled:
        cut = cut_recordings(dataset, found.clips, config, sizes, failed or {}, rows, manifest)
    shards = assign_shards(cut.clips, config.pack.shard_clips, rows)
    # What could be read when it was built and cannot now is as good as gone: a mount may be missing.
    digests = {clip.key: clip.digest for clip in cut.clips}
    waiting = {clip.key for clip in cut.waiting}
    unsure = [row.key for row in rows if recording_of(row.key) in waiting]
    whole = {clip.key for clip in found.clips if clip.digest}

    def follows(row: ClipRow) -> bool:
        # Its recording is looked through first; or the recording was refused as a whole and now has segments.
        refused = row.state != "packed" and row.key in whole
        return recording_of(row.key) in waiting or (refused and config.segment.enabled)

    gone = sorted(
        row.key
        for row in rows
        if (row.key not in digests or (row.digest and not digests[row.key])) and not follows(row)
    )
    recut = [key for key in gone if recording_of(key) in whole]
    where = source.rstrip("/") if is_remote(source) else str(local_path(source).absolute())
    notes = [f"source layout: {found.layout}", *found.notes, *cut.notes]
    if unsure:
        some = f"{count(len(unsure), 'clip')} of the dataset, e.g. {unsure[0]}"
        why = "looked through anew (other settings or other media)"
        if not _was_cut(manifest):
            why = "cut into segments for the first time (--segment)"
        notes.append(
            f"{some}, from recordings that are {why}; those whose keys do not come back will count as gone "
            "(--drop-missing)"
        )
    unreadable = [clip.uri for clip in found.clips if not clip.digest]
    if unreadable:
        notes.append(f"media of {count(len(unreadable), 'clip')} cannot be read, e.g. {unreadable[0]}")
    if manifest and manifest.config["pack"]["shard_clips"] != config.pack.shard_clips:
        notes.append("pack.shard_clips counts for new shards; clips stay in the shard that they are in")
    return Survey(
        dataset=dataset,
        manifest=manifest,
        version=version,
        rows=rows,
        config=config,
        source=where,
        shards=shards,
        gone=gone,
        recut=recut,
        unsure=unsure,
        sizes=sizes,
        recordings=found.clips,
        scans=cut.scans,
        notes=notes,
    )

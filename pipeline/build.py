"""`build`: from a source to a dataset. Does what is missing, keeps what is there, commits at the end."""

from __future__ import annotations

import fcntl
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pipeline.columns import Column
from pipeline.config import BuildConfig
from pipeline.pack import common_widths, disagreeing, pack_inputs, pack_shard, surviving
from pipeline.plan import Plan, assign_shards, columns_of
from pipeline.registry import STAGES, writers
from pipeline.sources import Source, list_clips
from pipeline.stage import Clip
from pipeline.tables import check_conservation, make_tables
from pipeline.work import Work
from shards.dataset import (
    CLIPS,
    INDEX,
    MANIFEST,
    QUARANTINE,
    ClipRow,
    Dataset,
    Index,
    Manifest,
    PackedShard,
    QuarantineRow,
)
from shards.errors import UserError
from shards.schema import FIELDS, SCHEMA_VERSION, VIDEO_RATE

LOCK = ".lock"


@dataclass(frozen=True)
class Summary:
    """What a build did.

    Attributes:
        tasks: stage x shard units run; `kept` those that were there before.
        packed: packed shards written; `shards` all that the dataset has.
        quarantined: reason code -> clips.
        changed: whether the dataset is another than before.
    """

    dataset: str
    clips: int
    seconds: float
    tasks: int
    kept: int
    packed: int
    shards: int
    quarantined: dict[str, int]
    changed: bool
    notes: list[str]


def build(source: str, uri: str, config: BuildConfig) -> Summary:
    """Build or complete the dataset at `uri` from `source`.

    Raises:
        UserError: unusable source, a dataset of another profile or schema, a worker that keeps dying.
    """
    dataset = Dataset(uri)
    _previous(dataset, config)
    found = list_clips(source, config.source)
    dataset.store.root.mkdir(parents=True, exist_ok=True)
    with _alone(dataset):
        return _build(dataset, found, config)


def _build(dataset: Dataset, found: Source, config: BuildConfig) -> Summary:
    previous = _previous(dataset, config)
    shards = assign_shards(found.clips, config.pack.shard_clips, dataset.clips() if previous else ())
    work = Work(dataset, config, shards)
    codebook = work.codebook(previous)
    plan = work.run(codebook)
    index, written = _pack(dataset, config, shards, plan)
    rows, refused = make_tables(dataset, shards, plan)
    check_conservation(shards, index, refused)
    manifest = _manifest(config, plan, codebook, shards)
    changed = not _is_current(dataset, previous, manifest, index, rows, refused)
    notes = [f"source layout: {found.layout}", *found.notes]
    gone = {row.key for row in dataset.clips()} - {row.key for row in rows} if previous else set()
    if gone:
        notes.append(f"{len(gone)} clips of the last build are no longer in the source, e.g. {min(gone)}")
    if changed:
        dataset.write_rows(CLIPS, ClipRow, rows)
        dataset.write_rows(QUARANTINE, QuarantineRow, refused)
        dataset.write(INDEX, index)
        dataset.write(MANIFEST, manifest)
    frames = sum(clip.frames for shard in index.shards for clip in shard.clips)
    return Summary(
        dataset=dataset.uri,
        clips=sum(len(shard.clips) for shard in index.shards),
        seconds=frames / VIDEO_RATE,
        tasks=work.ran,
        kept=plan.done + len(plan.tasks) - work.ran,
        packed=written,
        shards=len(index.shards),
        quarantined=dict(Counter(row.reason for row in refused)),
        changed=changed,
        notes=notes + _leftovers(dataset, index),
    )


@contextmanager
def _alone(dataset: Dataset) -> Iterator[None]:
    """Hold the dataset's lock; it ends with the process, however that ends.

    Raises:
        UserError: another build holds it.
    """
    with open(dataset.store.path(LOCK), "a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{dataset.uri}: another build is at work in this dataset; wait for it to end") from None
        yield


def _leftovers(dataset: Dataset, index: Index) -> list[str]:
    """A line on packed shards of earlier builds: a training run may still read them, a glob must not."""
    current = {shard.name for shard in index.shards}
    old = [f"train/{path.name}" for path in dataset.store.path("train").glob("*.tar")]
    stale = sorted(set(old) - current)
    if not stale:
        return []
    return [f"{len(stale)} shards of earlier builds are still in train/, e.g. {stale[0]}; see train/index.json"]


def _previous(dataset: Dataset, config: BuildConfig) -> Manifest | None:
    if not dataset.exists():
        root = dataset.store.root
        known = {"columns", "codebooks", "train", CLIPS, QUARANTINE, LOCK}
        names = [path.name for path in root.iterdir()] if root.is_dir() else []
        foreign = sorted(name for name in names if name not in known and not name.startswith(".writing-"))
        if root.exists() and not root.is_dir():
            raise UserError(f"{dataset.uri}: is a file; name a folder for the dataset")
        if foreign:
            raise UserError(f"{dataset.uri}: holds other files ({foreign[0]} ...); name a new or empty folder")
        return None
    manifest = dataset.manifest()
    if manifest.profile != config.profile:
        raise UserError(f"{dataset.uri}: built with profile {manifest.profile}, not {config.profile}; use a new folder")
    return manifest


def _pack(dataset: Dataset, config: BuildConfig, shards: dict[str, list[Clip]], plan: Plan) -> tuple[Index, int]:
    made = writers(STAGES)
    fields = [name for name in FIELDS if name in config.pack.fields and name != "meta"]
    stages = [kind.name for kind in STAGES if any(made[name] is kind for name in fields)]
    before = {shard.shard: shard for shard in dataset.index().shards} if dataset.store.exists(INDEX) else {}
    packed: list[PackedShard] = []
    columns: list[Column] = []
    written = 0
    for shard, clips in shards.items():
        # A clip that any stage refused is in no packed shard, whichever fields are packed.
        everything = columns_of(dataset, plan, shard, list(plan.marks))
        columns += everything
        odd = {clip.key for clip, _ in disagreeing(everything, clips)}
        alive = [clip for clip in surviving(everything, clips) if clip.key not in odd]
        chosen = [column for column in everything if column.stage in stages]
        old = before.get(shard)
        fresh = old is not None and old.inputs == pack_inputs(chosen, fields, alive)
        if old and fresh and dataset.store.size(old.name) == old.bytes:
            packed.append(old)
        elif alive:
            packed.append(pack_shard(dataset, shard, chosen, fields, alive))
            written += 1
    index = Index(
        schema_version=SCHEMA_VERSION,
        profile=config.profile,
        fields=["meta", *fields],
        widths=common_widths(columns),
        weights=plan.weights,
        config=_record(config),
        shards=packed,
    )
    return index, written


def _is_current(
    dataset: Dataset,
    previous: Manifest | None,
    manifest: Manifest,
    index: Index,
    rows: list[ClipRow],
    refused: list[QuarantineRow],
) -> bool:
    """Whether the dataset says all this already; a build that died between its last writes leaves them unequal."""
    if previous != manifest or not all(map(dataset.store.exists, (CLIPS, QUARANTINE, INDEX))):
        return False
    return dataset.index() == index and dataset.clips() == rows and dataset.quarantine() == refused


def _manifest(
    config: BuildConfig, plan: Plan, codebook: dict[str, str] | None, shards: dict[str, list[Clip]]
) -> Manifest:
    return Manifest(
        schema_version=SCHEMA_VERSION,
        profile=config.profile,
        splits=sorted({shard.rsplit("-", 1)[0] for shard in shards}),
        columns=plan.marks,
        weights=plan.weights,
        codebook=codebook,
        config=_record(config),
    )


def _record(config: BuildConfig) -> dict[str, Any]:
    """The configuration as stored: what decides content, not how or where it ran."""
    return config.model_dump(mode="json", exclude={"run", "source"})

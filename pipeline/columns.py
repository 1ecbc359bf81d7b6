"""Columns: one stage's fields for the clips of one shard, as an immutable WebDataset tar named by its fingerprint.

Beside each tar lies a `.json` record with the clips that are in, the ones that were refused and why, the byte offsets,
and what it took. The record is written last: a column exists when it does.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from pipeline.records import Record, load_record, publish_record
from pipeline.stage import Clip, Fields, Item, Reason, Rejection, Stage
from shards.codec import decode, encode
from shards.config import Config
from shards.dataset import Dataset
from shards.errors import UserError
from shards.manifest import ColumnRef, Recipe, column_record, column_tar
from shards.schema import FIELDS, SCHEMA_VERSION, SchemaError, check_sample, frames_of
from shards.tar import write_tar

READ_AHEAD = 8 << 20
"""Bytes of a column that are read at once."""


class Task(Config):
    """One stage over one shard.

    Attributes:
        fingerprint: of the column to make.
        reads: upstream stage -> fingerprint of the column to read.
        media: digest of the shard's clips, for stages that decode media; else empty.
        attempt: counts from 1.
        reuse: fingerprint of a column of the same stage and shard whose kept fields spare the network; it decides what
            the work costs, not what comes out, and is no part of the fingerprint.
    """

    stage: str
    shard: str
    fingerprint: str
    recipe: Recipe
    reads: dict[str, str]
    media: str
    attempt: int
    reuse: str | None = None


class Refused(Config):
    """A clip that the stage refused."""

    key: str
    reason: Reason
    message: str
    traceback: str = ""


class ColumnClip(Config):
    """A clip in the column; `members` maps field name to (byte offset, size)."""

    frames: int
    members: dict[str, tuple[int, int]]


class Column(Record):
    """Record of a column; `widths` are the named widths (`D_identity` ...) that its values have."""

    schema_version: int
    task: Task
    clips: dict[str, ColumnClip]
    refused: list[Refused]
    widths: dict[str, int]
    sha256: str
    bytes: int
    seconds: float

    @property
    def tar(self) -> str:
        """Object name of its tar."""
        return column_tar(self.task.stage, self.task.shard, self.task.fingerprint, self.sha256)

    @property
    def name(self) -> str:
        """Object name of the record."""
        return column_record(self.task.stage, self.task.shard, self.task.fingerprint)

    @property
    def tar_size(self) -> tuple[str, int]:
        """Object name and size of its tar."""
        return self.tar, self.bytes

    def ref(self, recipe: str) -> ColumnRef:
        """What the manifest says of it; `recipe` is the recipe's key there."""
        return ColumnRef(
            fingerprint=self.task.fingerprint,
            recipe=recipe,
            reads=self.task.reads,
            media=self.task.media,
            attempt=self.task.attempt,
            record=self.digest(),
            sha256=self.sha256,
            bytes=self.bytes,
            clips=len(self.clips),
            refused=len(self.refused),
            seconds=self.seconds,
            reuse=self.task.reuse,
        )


def load_column(dataset: Dataset, stage: str, shard: str, mark: str) -> Column | None:
    """The record of a column, or None where the column does not exist or its tar is not as long as the record says.

    Raises:
        UserError: the record is damaged.
    """
    return load_record(dataset, Column, column_record(stage, shard, mark))


def build_column(
    dataset: Dataset,
    stage: Stage[Any],
    task: Task,
    clips: Sequence[Clip],
    reads: Sequence[Column],
    kept: Column | None = None,
) -> Column:
    """Run a stage over a shard and publish its column.

    Args:
        clips: the shard's clips, ordered by key; the ones that a column in `reads` lacks are skipped.
        reads: records of the columns that hold the fields the stage reads.
        kept: record of the stage's own column in `task.reuse`; clips that it refused stay refused.

    A value that breaks the schema refuses its clip as a fault; the other clips go on.
    """
    begin = time.perf_counter()
    refused = [Refused(key=clip.key, **asdict(clip.refused)) for clip in clips if clip.refused and stage.media]
    refused += kept.refused if kept else []
    items = _items(dataset, stage.kept, clips, [kept]) if kept else _items(dataset, stage.reads, clips, reads)
    frames: dict[str, int] = {}
    widths: dict[str, int] = {}

    def members() -> Iterator[tuple[str, bytes]]:
        # One clip at a time on its way from the upstream columns into the tar, so memory does not grow with the shard.
        for item, result in stage.process(items):
            key = item.clip.key
            encoded = result if isinstance(result, Rejection) else _encode(stage, item, result, widths)
            if isinstance(encoded, Rejection):
                refused.append(Refused(key=key, **asdict(encoded)))
                continue
            frames[key] = encoded[0]
            yield from ((f"{key}.{suffix}", data) for suffix, data in sorted(encoded[1].items()))

    with dataset.store.draft() as draft:
        written = write_tar(draft.stream, members())
        draft.publish(column_tar(task.stage, task.shard, task.fingerprint, written.sha256))
    places = {member.name: (member.offset, member.size) for member in written.members}
    column = Column(
        schema_version=SCHEMA_VERSION,
        task=task,
        clips={
            key: ColumnClip(
                frames=count,
                members={field: places[f"{key}.{FIELDS[field].suffix}"] for field in stage.gives()},
            )
            for key, count in frames.items()
        },
        refused=refused,
        widths=widths,
        sha256=written.sha256,
        bytes=written.bytes,
        seconds=round(time.perf_counter() - begin, 3),
    )
    return publish_record(dataset, column)


def read_members(
    dataset: Dataset, column: Column, keys: Sequence[str], names: Sequence[str]
) -> Iterator[dict[str, bytes]]:
    """Stored bytes of the fields `names` of each clip in `keys`, in order.

    Raises:
        UserError: the column is missing or shorter than its record says.
    """
    done = 0
    while done < len(keys):
        total, stop = 0, done
        while stop < len(keys) and (stop == done or total < READ_AHEAD):
            total += sum(column.clips[keys[stop]].members[name][1] for name in names)
            stop += 1
        places = [column.clips[key].members[name] for key in keys[done:stop] for name in names]
        try:
            data = iter(dataset.store.read_ranges(column.tar, places))
        except FileNotFoundError:
            raise UserError(f"{dataset.uri}/{column.tar}: gone since the build began; build again") from None
        for _ in keys[done:stop]:
            yield {name: next(data) for name in names}
        done = stop


def _items(dataset: Dataset, names: Sequence[str], clips: Sequence[Clip], reads: Sequence[Column]) -> Iterator[Item]:
    alive = [clip for clip in clips if not clip.refused and all(clip.key in column.clips for column in reads)]
    keys = [clip.key for clip in alive]
    streams = [
        read_members(dataset, column, keys, [name for name in names if FIELDS[name].stage == column.task.stage])
        for column in reads
    ]
    for clip in alive:
        raw: dict[str, bytes] = {}
        for stream in streams:
            raw.update(next(stream))
        frames = reads[0].clips[clip.key].frames if reads else 0
        fields = {name: decode(FIELDS[name], data, frames) for name, data in raw.items()}
        yield Item(clip, fields)


def _encode(
    stage: Stage[Any], item: Item, values: Fields, widths: dict[str, int]
) -> tuple[int, dict[str, bytes]] | Rejection:
    """(F, ending -> bytes) of a stage's fields, checked against the schema."""
    try:
        if set(values) != set(stage.gives()):
            raise SchemaError(f"stage {stage.name} gave {sorted(values)}, it declares {sorted(stage.gives())}")
        known = {**item.fields, **values}
        counts = {name: frames_of(FIELDS[name], value) for name, value in known.items()}
        lengths = {count for count in counts.values() if count is not None}
        if len(lengths) != 1:
            raise SchemaError(f"fields disagree on the clip's length in frames: {counts}")
        frames = lengths.pop()
        check_sample(values, frames, widths)
        return frames, {FIELDS[name].suffix: encode(FIELDS[name], value) for name, value in values.items()}
    except SchemaError as error:
        return Rejection(Reason.FAULT, str(error))

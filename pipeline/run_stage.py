"""One stage over one shard: clips and the columns it reads go in, its own column comes out."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.columns import Column, ColumnClip, Refused, Task, read_members
from pipeline.in_flight import Watch
from pipeline.records import publish_record
from pipeline.stage import Clip, Fields, Item, Reason, Rejection, Stage
from shards.codec import decode, encode
from shards.dataset import Dataset
from shards.manifest import column_tar
from shards.schema import FIELDS, SCHEMA_VERSION, SchemaError, check_sample, frames_of
from shards.tar import write_tar


@dataclass
class Effort:
    """What making a column took, besides what its record says.

    Attributes:
        compute: seconds inside the stage, without reading its fields and without encoding and writing them.
        read: bytes of columns.
    """

    compute: float = 0.0
    read: int = 0


def build_column(
    dataset: Dataset,
    stage: Stage[Any],
    task: Task,
    clips: Sequence[Clip],
    reads: Sequence[Column],
    kept: Column | None = None,
    watch: Watch | None = None,
    alone: Collection[str] = (),
    given_up: Sequence[Refused] = (),
) -> tuple[Column, Effort]:
    """Run a stage over a shard and publish its column.

    Args:
        clips: the shard's clips, ordered by key; the ones that a column in `reads` lacks are skipped.
        reads: records of the columns that hold the fields the stage reads.
        kept: record of the stage's own column in `task.reuse`; clips that it refused stay refused.
        watch: is told of each clip that is taken and done.
        alone: keys of clips to be done first and one by one; what comes out depends on that no more than on a batch.
        given_up: clips that are refused without trying.

    A value that breaks the schema refuses its clip as a fault; the other clips go on.
    """
    begin = time.perf_counter()
    refused = [Refused(key=clip.key, **asdict(clip.refused)) for clip in clips if clip.refused and stage.media]
    refused += kept.refused if kept else []
    said = {refusal.key for refusal in refused}
    refused += [refusal for refusal in given_up if refusal.key not in said]
    skipped = {refusal.key for refusal in refused}
    places = {clip.key: place for place, clip in enumerate(clips)}
    columns, names = ([kept], stage.kept) if kept else (reads, stage.uses())
    alive = [
        clip
        for clip in clips
        if not clip.refused and clip.key not in skipped and all(clip.key in column.clips for column in columns)
    ]
    effort = Effort()
    frames: dict[str, int] = {}
    widths: dict[str, int] = {}

    def taken(some: Sequence[Clip]) -> Iterator[Item]:
        items = _items(dataset, names, some, columns, effort)
        while True:
            start = time.perf_counter()
            item = next(items, None)
            # It is the stage that asks for its next item, so reading falls into its time.
            effort.compute -= time.perf_counter() - start
            if item is None:
                return
            if watch:
                watch.take(places[item.clip.key])
            yield item

    def outcomes(some: Sequence[Clip]) -> Iterator[tuple[Item, Fields | Rejection]]:
        results = stage.process(taken(some))
        while True:
            start = time.perf_counter()
            result = next(results, None)
            effort.compute += time.perf_counter() - start
            if result is None:
                return
            if watch:
                watch.put(places[result[0].clip.key], _reason(result[1]))
            yield result

    def members() -> Iterator[tuple[str, bytes]]:
        first = {item.clip.key: (item, result) for c in alive if c.key in alone for item, result in outcomes([c])}
        rest = outcomes([clip for clip in alive if clip.key not in first])
        # One clip at a time on its way from the upstream columns into the tar, so memory does not grow with the shard.
        for clip in alive:
            item, result = first.pop(clip.key) if clip.key in first else next(rest)
            assert item.clip is clip, f"stage {stage.name} changed the order of clips"
            encoded = result if isinstance(result, Rejection) else _encode(stage, item, result, widths)
            if isinstance(encoded, Rejection):
                refused.append(Refused(key=clip.key, **asdict(encoded)))
                continue
            frames[clip.key] = encoded[0]
            yield from ((f"{clip.key}.{suffix}", data) for suffix, data in sorted(encoded[1].items()))
        next(rest, None)  # lets the stage come to its end

    with dataset.store.draft() as draft:
        written = write_tar(draft.stream, members())
        if watch:
            watch.prepare()
        draft.publish(column_tar(task.stage, task.shard, task.fingerprint, written.sha256))
    offsets = {member.name: (member.offset, member.size) for member in written.members}
    column = Column(
        schema_version=SCHEMA_VERSION,
        task=task,
        clips={
            key: ColumnClip(
                frames=count,
                members={field: offsets[f"{key}.{FIELDS[field].suffix}"] for field in stage.gives()},
            )
            for key, count in frames.items()
        },
        refused=refused,
        widths=widths,
        sha256=written.sha256,
        bytes=written.bytes,
        seconds=round(time.perf_counter() - begin, 3),
    )
    return publish_record(dataset, column), effort


def _reason(result: Fields | Rejection) -> str | None:
    return result.reason.value if isinstance(result, Rejection) else None


def _items(
    dataset: Dataset, names: Sequence[str], clips: Sequence[Clip], reads: Sequence[Column], effort: Effort
) -> Iterator[Item]:
    keys = [clip.key for clip in clips]
    wanted = [(column, [name for name in names if FIELDS[name].stage == column.task.stage]) for column in reads]
    streams = [read_members(dataset, column, keys, of_column) for column, of_column in wanted if of_column]
    for clip in clips:
        raw: dict[str, bytes] = {}
        for stream in streams:
            raw.update(next(stream))
        effort.read += sum(map(len, raw.values()))
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

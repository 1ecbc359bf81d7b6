"""Columns: one stage's fields for the clips of one shard, as an immutable WebDataset tar named by its fingerprint.

Beside each `columns/<stage>/<shard>-<fingerprint>.tar` lies a `.json` record with the clips that are in, the ones that
were refused and why, the byte offsets, and what it took. The record is written last: a column exists when it does.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from pydantic import ValidationError

from pipeline.stage import Clip, Fields, Item, Reason, Rejection, Stage
from shards.codec import decode, encode
from shards.config import Config
from shards.dataset import Dataset
from shards.errors import UserError
from shards.schema import FIELDS, SCHEMA_VERSION, SchemaError, check_sample, frames_of
from shards.tar import write_tar


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


class Column(Config):
    """Record of a column object; `widths` are the named widths (`D_identity` ...) that its values have."""

    schema_version: int
    stage: str
    shard: str
    fingerprint: str
    weights: str
    clips: dict[str, ColumnClip]
    refused: list[Refused]
    widths: dict[str, int]
    sha256: str
    bytes: int
    seconds: float


def column_name(stage: str, shard: str, fingerprint: str) -> str:
    """Object name without its ending."""
    return f"columns/{stage}/{shard}-{fingerprint}"


def fingerprint(stage: Stage[Any], weights: str, upstream: dict[str, str], clips: Sequence[Clip]) -> str:
    """Hash of all that decides a column's content.

    Args:
        weights: digest of the stage's network files.
        upstream: stage name -> fingerprint of the columns that it reads.
        clips: of the shard; only stages that decode media depend on them directly, by content and cut.

    Paths in the configuration do not count: the content of the files they name does, through `weights`.
    """
    settings = {key: value for key, value in stage.config.model_dump().items() if not key_is_path(stage, key)}
    identity = {
        "schema": SCHEMA_VERSION,
        "stage": stage.name,
        "version": stage.version,
        "config": settings,
        "weights": weights,
        "upstream": upstream,
        "media": [(clip.key, clip.digest, clip.start, clip.end) for clip in clips] if stage.media else None,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=list).encode()).hexdigest()[:16]


def key_is_path(stage: Stage[Any], key: str) -> bool:
    """Whether a configuration key names a file."""
    return "Path" in str(type(stage.config).model_fields[key].annotation)


def load_column(dataset: Dataset, stage: str, shard: str, mark: str) -> Column | None:
    """The record of a column, or None where the column does not exist or its tar is not as long as the record says.

    Raises:
        UserError: the record is damaged.
    """
    name = column_name(stage, shard, mark) + ".json"
    try:
        data = dataset.store.read(name)
    except FileNotFoundError:
        return None
    try:
        column = Column.model_validate_json(data)
        return column if dataset.store.size(column_name(stage, shard, mark) + ".tar") == column.bytes else None
    except ValidationError as error:
        raise UserError(
            f"{dataset.uri}/{name}: damaged ({error.error_count()} wrong entries); delete it and build again"
        ) from None


def build_column(
    dataset: Dataset,
    stage: Stage[Any],
    weights: str,
    shard: str,
    mark: str,
    clips: Sequence[Clip],
    reads: Sequence[Column],
) -> Column:
    """Run a stage over a shard and publish its column.

    Args:
        mark: the column's fingerprint.
        clips: the shard's clips, ordered by key; the ones that a column in `reads` lacks are skipped.
        reads: records of the columns that hold the fields the stage reads.

    A value that breaks the schema refuses its clip as a fault; the other clips go on.
    """
    begin = time.perf_counter()
    refused: list[Refused] = []
    frames: dict[str, int] = {}
    widths: dict[str, int] = {}

    def members() -> Iterator[tuple[str, bytes]]:
        # One clip at a time on its way from the upstream columns into the tar, so memory does not grow with the shard.
        for item, result in stage.process(_items(dataset, stage, clips, reads)):
            key = item.clip.key
            encoded = result if isinstance(result, Rejection) else _encode(stage, item, result, widths)
            if isinstance(encoded, Rejection):
                refused.append(Refused(key=key, **asdict(encoded)))
                continue
            frames[key] = encoded[0]
            yield from ((f"{key}.{suffix}", data) for suffix, data in sorted(encoded[1].items()))

    name = column_name(stage.name, shard, mark)
    with dataset.store.writer(name + ".tar") as stream:
        written = write_tar(stream, members())
    places = {member.name: (member.offset, member.size) for member in written.members}
    column = Column(
        schema_version=SCHEMA_VERSION,
        stage=stage.name,
        shard=shard,
        fingerprint=mark,
        weights=weights,
        clips={
            key: ColumnClip(
                frames=count,
                members={field: places[f"{key}.{FIELDS[field].suffix}"] for field in stage.writes},
            )
            for key, count in frames.items()
        },
        refused=refused,
        widths=widths,
        sha256=written.sha256,
        bytes=written.bytes,
        seconds=round(time.perf_counter() - begin, 3),
    )
    dataset.write(name + ".json", column)
    return column


def read_members(
    dataset: Dataset, column: Column, keys: Sequence[str], names: Sequence[str]
) -> Iterator[dict[str, bytes]]:
    """Stored bytes of the fields `names` of each clip in `keys`, in order.

    Raises:
        UserError: the column is shorter than its record says.
    """
    path = column_name(column.stage, column.shard, column.fingerprint) + ".tar"
    with open(dataset.store.path(path), "rb") as stream:
        for key in keys:
            found: dict[str, bytes] = {}
            for name in names:
                offset, size = column.clips[key].members[name]
                stream.seek(offset)
                found[name] = stream.read(size)
                if len(found[name]) != size:
                    raise UserError(
                        f"{dataset.uri}/{path}: cut at {key}.{name}; delete its .json record and build again"
                    )
            yield found


def _items(dataset: Dataset, stage: Stage[Any], clips: Sequence[Clip], reads: Sequence[Column]) -> Iterator[Item]:
    alive = [clip for clip in clips if all(clip.key in column.clips for column in reads)]
    keys = [clip.key for clip in alive]
    wanted = {column.stage: [name for name in stage.reads if FIELDS[name].stage == column.stage] for column in reads}
    streams = [read_members(dataset, column, keys, wanted[column.stage]) for column in reads]
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
        if set(values) != set(stage.writes):
            raise SchemaError(f"stage {stage.name} gave {sorted(values)}, it declares {sorted(stage.writes)}")
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

"""Packed shards: all fields of a clip side by side in one WebDataset tar, named by its own digest."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence

from pipeline.columns import Column, read_members
from pipeline.stage import Clip
from shards.codec import encode
from shards.dataset import Dataset, PackedClip, PackedShard
from shards.errors import UserError
from shards.schema import FIELDS, SCHEMA_VERSION
from shards.tar import write_tar


def pack_inputs(columns: Sequence[Column], fields: Sequence[str], clips: Sequence[Clip]) -> str:
    """Hash of all that decides a packed shard: columns, chosen fields and what goes into `meta`."""
    identity = {
        "schema": SCHEMA_VERSION,
        "columns": [(column.stage, column.fingerprint) for column in columns],
        "fields": list(fields),
        "clips": [(clip.key, clip.digest, clip.split, clip.speaker, clip.text) for clip in clips],
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def surviving(columns: Sequence[Column], clips: Sequence[Clip]) -> list[Clip]:
    """The clips that are in every column, in order."""
    return [clip for clip in clips if all(clip.key in column.clips for column in columns)]


def disagreeing(columns: Sequence[Column], clips: Sequence[Clip]) -> list[tuple[Clip, dict[str, int]]]:
    """Clips whose columns do not have one length, with each stage's F."""
    odd = []
    for clip in surviving(columns, clips):
        frames = {column.stage: column.clips[clip.key].frames for column in columns}
        if len(set(frames.values())) != 1:
            odd.append((clip, frames))
    return odd


def pack_shard(
    dataset: Dataset, shard: str, columns: Sequence[Column], fields: Sequence[str], clips: Sequence[Clip]
) -> PackedShard:
    """Write `train/<shard>-<digest>.tar`.

    Args:
        columns: records of the columns that hold `fields`.
        fields: names of the fields to pack besides `meta`.
        clips: the shard's clips that are in all columns with one length, ordered by key.

    The bytes depend on the columns' bytes and on the clips alone.
    """
    split = shard.rsplit("-", 1)[0]
    keys = [clip.key for clip in clips]
    wanted = {column.stage: [name for name in fields if FIELDS[name].stage == column.stage] for column in columns}
    streams = [read_members(dataset, column, keys, wanted[column.stage]) for column in columns]

    def members() -> Iterator[tuple[str, bytes]]:
        for clip in clips:
            frames = columns[0].clips[clip.key].frames
            sample = {FIELDS["meta"].suffix: encode(FIELDS["meta"], _meta(clip, frames))}
            for stream in streams:
                sample.update({FIELDS[name].suffix: data for name, data in next(stream).items()})
            yield from ((f"{clip.key}.{suffix}", data) for suffix, data in sorted(sample.items()))

    # The name holds the digest, which is known once all is written.
    with tempfile.TemporaryFile() as spool:
        written = write_tar(spool, members())
        spool.seek(0)
        name = f"train/{shard}-{written.sha256[:12]}.tar"
        with dataset.store.writer(name) as stream:
            shutil.copyfileobj(spool, stream, 1 << 20)
    places = {member.name: (member.offset, member.size) for member in written.members}
    return PackedShard(
        name=name,
        shard=shard,
        split=split,
        sha256=written.sha256,
        bytes=written.bytes,
        inputs=pack_inputs(columns, fields, clips),
        clips=[
            PackedClip(
                key=clip.key,
                frames=columns[0].clips[clip.key].frames,
                members={name: places[f"{clip.key}.{FIELDS[name].suffix}"] for name in ("meta", *fields)},
            )
            for clip in clips
        ],
    )


def common_widths(columns: Sequence[Column]) -> dict[str, int]:
    """Named widths (`D_identity` ...) of all columns.

    Raises:
        UserError: two columns disagree, so networks of different kinds were mixed.
    """
    widths: dict[str, int] = {}
    for column in columns:
        for name, width in column.widths.items():
            if widths.setdefault(name, width) != width:
                raise UserError(
                    f"{column.stage}: {name} is {width} in shard {column.shard} and {widths[name]} before it"
                )
    return widths


def _meta(clip: Clip, frames: int) -> dict[str, str | int]:
    return {
        "key": clip.key,
        "split": clip.split,
        "speaker": clip.speaker,
        "text": clip.text,
        "frames": frames,
        "source": clip.digest,
    }

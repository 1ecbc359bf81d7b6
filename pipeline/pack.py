"""Packed shards: all fields of a clip side by side in one WebDataset tar, named by its own digest.

Beside it goes a record of what became of every clip of the shard, so that a build that dies between packing and
committing packs nothing twice.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from pipeline.columns import Column, read_members
from pipeline.records import Record, load_record, publish_record
from pipeline.stage import Clip, Reason
from shards.codec import decode, encode
from shards.config import Config
from shards.dataset import Dataset
from shards.errors import UserError
from shards.manifest import PackedClip, PackedShard, PackRef, pack_record, split_of
from shards.schema import FIELDS, SCHEMA_VERSION, SchemaError, stored
from shards.tar import write_tar


class PackTask(Config):
    """Packing of one shard.

    Attributes:
        inputs: hash of all that follows and of the clips.
        reads: stage -> fingerprint of its column, for every stage in order.
        recipes: stage -> key of its recipe.
        behind: stages whose column read another one than that in `reads`.
        fields: to be packed besides `meta`.
        raw: those among them that columns hold as `jpg` and the packed shard as `npy`.
    """

    shard: str
    inputs: str
    reads: dict[str, str]
    recipes: dict[str, str]
    behind: tuple[str, ...]
    fields: tuple[str, ...]
    raw: tuple[str, ...] = ()
    stage: Literal["pack"] = "pack"


class Loss(Config):
    """Why a clip is not in the packed shard; the first stage that refused it speaks."""

    stage: str
    reason: Reason
    message: str
    traceback: str
    attempt: int


class Packed(Record):
    """Record of a shard: what was packed and what was lost; `widths` are the named widths of its fields."""

    schema_version: int
    shard: str
    inputs: str
    behind: list[str]
    packed: PackedShard | None
    lost: dict[str, Loss]
    widths: dict[str, int]
    seconds: float

    @property
    def name(self) -> str:
        """Object name of the record."""
        return pack_record(self.shard, self.inputs)

    @property
    def tar_size(self) -> tuple[str, int] | None:
        """Object name and size of the packed shard; None where no clip survived."""
        return (self.packed.name, self.packed.bytes) if self.packed else None

    def ref(self) -> PackRef:
        """What the manifest says of it."""
        shard = self.packed
        return PackRef(
            inputs=self.inputs,
            record=self.digest(),
            name=shard.name if shard else None,
            behind=self.behind,
            sha256=shard.sha256 if shard else "",
            bytes=shard.bytes if shard else 0,
            clips=len(shard.clips) if shard else 0,
            frames=sum(clip.frames for clip in shard.clips) if shard else 0,
            refused=dict(sorted(Counter(loss.reason.value for loss in self.lost.values()).items())),
            seconds=self.seconds,
            raw=shard.raw if shard else [],
        )


def load_packed(dataset: Dataset, shard: str, inputs: str) -> Packed | None:
    """The record of a packed shard, or None where it or its tar is missing or cut.

    Raises:
        UserError: the record is damaged.
    """
    return load_record(dataset, Packed, pack_record(shard, inputs))


def pack_shard(dataset: Dataset, task: PackTask, columns: Sequence[Column], clips: Sequence[Clip]) -> Packed:
    """Write `train/<shard>-<digest>.tar` and its record.

    Args:
        columns: records of the columns in `task.reads`.
        clips: of the shard, ordered by key. A clip that any stage refused is left out, whichever fields are packed.

    The bytes depend on the columns' bytes and on the clips alone.

    Raises:
        UserError: a column is missing or cut, or holds a damaged JPEG that is to be packed as `npy`.
    """
    begin = time.perf_counter()
    lost = _losses(columns, clips)
    kept = [clip for clip in clips if clip.key not in lost]
    packed = _write(dataset, task, columns, kept) if kept else None
    record = Packed(
        schema_version=SCHEMA_VERSION,
        shard=task.shard,
        inputs=task.inputs,
        behind=list(task.behind),
        packed=packed,
        lost=lost,
        widths={name: width for column in columns for name, width in column.widths.items()},
        seconds=round(time.perf_counter() - begin, 3),
    )
    return publish_record(dataset, record)


def _losses(columns: Sequence[Column], clips: Sequence[Clip]) -> dict[str, Loss]:
    lost: dict[str, Loss] = {}
    for column in columns:
        for refusal in column.refused:
            # Two branches (picture, sound) may refuse the same clip; the first stage in order speaks.
            said = refusal.model_dump(exclude={"key"})
            lost.setdefault(refusal.key, Loss(stage=column.task.stage, attempt=column.task.attempt, **said))
    for clip in clips:
        if clip.key in lost:
            continue
        missing = [column.task.stage for column in columns if clip.key not in column.clips]
        if missing:
            raise RuntimeError(f"{clip.key}: neither kept nor refused by {missing}")
        frames = {column.task.stage: column.clips[clip.key].frames for column in columns}
        if len(set(frames.values())) != 1:
            message = f"stages disagree on the number of video frames: {frames}"
            lost[clip.key] = Loss(stage="pack", reason=Reason.AUDIO_LENGTH, message=message, traceback="", attempt=1)
    return lost


def _write(dataset: Dataset, task: PackTask, columns: Sequence[Column], clips: Sequence[Clip]) -> PackedShard:
    keys = [clip.key for clip in clips]
    wanted = {column.task.stage: [n for n in task.fields if FIELDS[n].stage == column.task.stage] for column in columns}
    streams = [
        (column, read_members(dataset, column, keys, wanted[column.task.stage]))
        for column in columns
        if wanted[column.task.stage]
    ]
    lengths = {key: columns[0].clips[key].frames for key in keys}
    suffixes = {name: stored(name, task.raw).suffix for name in ("meta", *task.fields)}

    def members() -> Iterator[tuple[str, bytes]]:
        for clip in clips:
            sample = {suffixes["meta"]: encode(FIELDS["meta"], _meta(clip, lengths[clip.key]))}
            for column, stream in streams:
                for name, data in next(stream).items():
                    try:
                        sample[suffixes[name]] = _plain(name, data, lengths[clip.key]) if name in task.raw else data
                    except SchemaError as error:
                        raise UserError(f"{dataset.uri}/{column.tar}: {clip.key}: {error}; run `f2v verify`") from None
            yield from ((f"{clip.key}.{suffix}", data) for suffix, data in sorted(sample.items()))

    with dataset.store.draft() as draft:
        written = write_tar(draft.stream, members())
        name = f"train/{task.shard}-{written.sha256[:12]}.tar"
        draft.publish(name)
    places = {member.name: (member.offset, member.size) for member in written.members}
    return PackedShard(
        name=name,
        shard=task.shard,
        split=split_of(task.shard),
        sha256=written.sha256,
        bytes=written.bytes,
        recipes=task.recipes,
        behind=list(task.behind),
        raw=list(task.raw),
        clips=[
            PackedClip(
                key=key,
                frames=lengths[key],
                members={name: places[f"{key}.{suffix}"] for name, suffix in suffixes.items()},
            )
            for key in keys
        ],
    )


def _plain(name: str, data: bytes, frames: int) -> bytes:
    """A stored picture strip as `npy`."""
    return encode(stored(name, (name,)), decode(FIELDS[name], data, frames))


def _meta(clip: Clip, frames: int) -> dict[str, Any]:
    return {
        "key": clip.key,
        "split": clip.split,
        "speaker": clip.speaker,
        "text": clip.text,
        "frames": frames,
        "source": clip.digest,
    }

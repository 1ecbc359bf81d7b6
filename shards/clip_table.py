"""The clips that a training job draws from, as flat arrays: where each field of each lies."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.codec import decode
from shards.config import Config
from shards.dataset import ClipRow, Dataset
from shards.errors import UserError
from shards.fetch import ShardRef
from shards.layout import NEEDED
from shards.manifest import INDEX, Index, PackedShard, difference
from shards.schema import FIELDS, VIDEO_RATE, SchemaError, stored
from shards.storage import open_store
from shards.stream_config import Condition

SHOWN = 8
"""Values of a column that a message lists."""


class Snapshot(Config):
    """One state of a dataset: names of its index and clip table, which stay readable until `f2v gc`."""

    index: str
    clips: str


@dataclass(frozen=True)
class ClipTable:
    """Clips of one dataset, in the order of its index.

    Attributes:
        snapshot: state of the dataset that this is.
        index: without clips.
        shards: whose clips these are.
        raw: per shard, whether its lips need no decoding.
        keys: per clip.
        shard_of, frames: int64 [clips].
        fields: that are read.
        places: int64 [clips, fields, 2], byte offset and size of each field in the shard.
    """

    uri: str
    snapshot: Snapshot
    index: Index
    shards: list[ShardRef]
    raw: list[bool]
    keys: list[str]
    shard_of: NDArray[np.int64]
    frames: NDArray[np.int64]
    fields: tuple[str, ...]
    places: NDArray[np.int64]

    def read(self, clip: int, name: str) -> Any:
        """One field of a clip, straight from storage. Raises UserError: the shard is missing or damaged."""
        ref = self.shards[int(self.shard_of[clip])]
        offset, size = self.places[clip, self.fields.index(name)].tolist()
        try:
            [data] = open_store(self.uri).read_ranges(ref.name, [(offset, size)])
            raw = ["lips"] if self.raw[int(self.shard_of[clip])] else []
            return decode(stored(name, raw), data, int(self.frames[clip]))
        except FileNotFoundError:
            raise UserError(f"{self.uri}/{ref.name}: missing; run `f2v verify`") from None
        except SchemaError as error:
            raise UserError(f"{self.uri}/{ref.name}: {self.keys[clip]}: {error}; run `f2v verify`") from None


def load_clips(
    uri: str,
    split: str,
    min_frames: int,
    where: Mapping[str, Condition],
    snapshot: Snapshot | None = None,
    key: str = "data.where",
    fields: tuple[str, ...] = NEEDED,
) -> ClipTable:
    """Clips of a split that have `min_frames` frames or more and meet all conditions.

    Args:
        snapshot: state of the dataset to read; default the current one.
        key: where the conditions stand in the configuration, for messages about them.
        fields: to be read.

    Raises:
        UserError: no dataset, no such state any more, no such split, one of `fields` is missing, shards of the split
            were made in different ways, an unknown column in a condition, or no clip is left.
    """
    dataset = Dataset(uri)
    if snapshot is None:
        manifest = dataset.manifest()
        snapshot = Snapshot(index=manifest.index.name, clips=manifest.clips.name)
    elif not dataset.store.exists(snapshot.index) or (where and not dataset.store.exists(snapshot.clips)):
        raise UserError(
            f"{dataset.uri}: the state that this run began with is not here ({snapshot.index}): another dataset, or "
            "built again since, and `f2v gc` deleted it. Train in a new folder, or with --set data.index=current "
            "(refused where a setting of what training reads has changed)"
        )
    index, clips = dataset.index_and_clips(snapshot.index)
    missing = [name for name in fields if name not in index.fields]
    if missing:
        raise UserError(f"{dataset.uri}: training needs the fields {missing}; build with them in pack.fields")
    splits = sorted({shard.split for shard in index.shards})
    if split not in splits:
        raise UserError(f"no split {split!r} in {dataset.uri}; splits are {', '.join(splits) or 'none'}")
    index.recipe(split)
    wanted = None
    if where:
        rows = dataset.clips_named(snapshot.clips)
        usable = {row.key for row in rows if row.state == "packed" and row.split == split and row.frames >= min_frames}
        wanted = _wanted(rows, usable, where, dataset.uri, key)
    listing = f"{dataset.uri}/{snapshot.index}"
    used: list[PackedShard] = []
    keys: list[str] = []
    counts, frames, places = [], [], []
    for shard, listed in zip(index.shards, clips, strict=True):
        if shard.split != split:
            continue
        found = [clip for clip in _places(listed, fields, shard, listing) if clip[1] >= min_frames]
        if wanted is not None:
            found = [clip for clip in found if clip[0] in wanted]
        if found:
            used.append(shard)
            counts.append(len(found))
            keys += [key for key, _, _ in found]
            frames += [length for _, length, _ in found]
            places.append(np.array([members for _, _, members in found], np.int64))
    if not keys:
        conditions = f" that meet {_words(where)}" if where else ""
        raise UserError(f"{dataset.uri}: no clips of {min_frames} frames or more in split {split!r}{conditions}")
    return ClipTable(
        uri=dataset.uri,
        snapshot=snapshot,
        index=index,
        shards=[ShardRef(dataset.uri, shard.name, shard.sha256, shard.bytes) for shard in used],
        raw=["lips" in shard.raw for shard in used],
        keys=keys,
        shard_of=np.repeat(np.arange(len(used)), counts),
        frames=np.array(frames, np.int64),
        fields=fields,
        places=np.concatenate(places),
    )


def _places(
    listed: Any, fields: Sequence[str], shard: PackedShard, where: str
) -> list[tuple[str, int, list[list[int]]]]:
    """Key, frames and places of `fields` of every clip that an index lists for a shard."""
    try:
        found = [(clip["key"], clip["frames"], [clip["members"][name] for name in fields]) for clip in listed]
        array = np.array([members for _, _, members in found])
        sound = not found or (array.dtype == np.int64 and array.shape[1:] == (len(fields), 2))
        sound = sound and all(type(key) is str and type(frames) is int and frames > 0 for key, frames, _ in found)
        if not sound or (found and (array.min() < 0 or array.sum(axis=2).max() > shard.bytes)):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{where}: damaged, clips of {shard.name}; put its copy {INDEX} in its place") from None
    return found


def check_alike(tables: Sequence[ClipTable], split: str) -> None:
    """Raise UserError where datasets of a mixture were not made in one way: profile, schema, widths, every stage."""
    first = tables[0]
    ours = first.index.recipe(split)
    for table in tables[1:]:
        pair = f"{first.uri} and {table.uri} cannot be mixed"
        if table.index.profile != first.index.profile:
            raise UserError(f"{pair}: profile {first.index.profile} and profile {table.index.profile}")
        if table.index.widths != first.index.widths:
            raise UserError(f"{pair}: widths {first.index.widths} and {table.index.widths}")
        theirs = table.index.recipe(split)
        for stage in sorted({FIELDS[name].stage for name in first.fields} & {*ours, *theirs}):
            if stage not in ours or stage not in theirs or ours[stage] != theirs[stage]:
                both = stage in ours and stage in theirs
                why = "; ".join(difference(ours[stage], theirs[stage])) if both else "only one has it"
                raise UserError(f"{pair}: stage {stage} differs ({why}); build both with the same settings")


def _wanted(
    rows: Sequence[ClipRow], usable: Collection[str], where: Mapping[str, Condition], uri: str, key: str
) -> set[str]:
    """Keys of the rows that meet all conditions; `usable` are the keys that training could draw."""
    columns = {field.name for field in dataclasses.fields(ClipRow)}
    unknown = sorted(set(where) - columns - {"duration"})
    if unknown:
        raise UserError(
            f"{key}.{unknown[0]}: {uri} has no such column; there are {', '.join(sorted(columns))}, duration"
        )
    for name, condition in where.items():
        # Of all clips: what only another split has is no mistake, as validation has the same conditions.
        there = {_value(row, name) for row in rows}
        for value in (*(condition.one_of or ()), *condition.none_of):
            # YAML reads a speaker called 12 as a number.
            if value not in there and str(value) not in there:
                found = sorted({str(_value(row, name)) for row in rows if row.key in usable} - {"None"})
                some = ", ".join(found[:SHOWN]) + (f" and {len(found) - SHOWN} more" if len(found) > SHOWN else "")
                raise UserError(f"{key}.{name}: no clip of {uri} has {value!r}; there are {some or 'none'}")
    return {row.key for row in rows if all(_meets(_value(row, name), name, where[name], key) for name in where)}


def _value(row: ClipRow, name: str) -> str | float | None:
    value: str | float | None = row.frames / VIDEO_RATE if name == "duration" else getattr(row, name)
    return None if value == "" else value


def _meets(value: str | float | None, name: str, condition: Condition, key: str) -> bool:
    if value is None:
        return False
    text = isinstance(value, str)
    if text and (condition.at_least is not None or condition.at_most is not None):
        raise UserError(f"{key}.{name}: a text has no at_least or at_most; give one_of or none_of")

    def among(values: Sequence[str | float]) -> bool:
        return str(value) in map(str, values) if text else value in values

    return (
        (condition.one_of is None or among(condition.one_of))
        and not among(condition.none_of)
        and (condition.at_least is None or float(value) >= condition.at_least)
        and (condition.at_most is None or float(value) <= condition.at_most)
    )


def _words(where: Mapping[str, Condition]) -> str:
    """Conditions as they are written in a configuration."""

    def plain(value: Any) -> str:
        return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else f"{value:g}"

    return ", ".join(
        f"{name} "
        + " and ".join(f"{how} {plain(value)}" for how, value in condition.model_dump(exclude_defaults=True).items())
        for name, condition in where.items()
    )

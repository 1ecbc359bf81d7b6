"""Single fields out of packed shards and columns by byte offset, without reading the rest."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from shards.codec import decode
from shards.dataset import Dataset
from shards.errors import UserError
from shards.manifest import PackedClip, PackedShard
from shards.schema import SchemaError, stored


def read_fields(dataset: Dataset, shard: PackedShard, clip: PackedClip, names: Sequence[str]) -> dict[str, Any]:
    """Decoded fields of one clip.

    Raises:
        UserError: a field was not packed, the shard is missing, or its bytes are damaged.
    """
    for name in names:
        if name not in clip.members:
            raise UserError(f"{dataset.uri}: field {name!r} was not packed; add it to pack.fields and build")
    places = {name: clip.members[name] for name in names}
    return read_places(dataset, shard.name, places, clip.key, clip.frames, shard.raw)


def read_places(
    dataset: Dataset,
    tar: str,
    places: Mapping[str, tuple[int, int]],
    key: str,
    frames: int,
    raw: Collection[str] = (),
    gap: int | None = None,
) -> dict[str, Any]:
    """Decoded fields of one clip from a packed shard or a column.

    Args:
        tar: name of the object.
        places: field -> (byte offset, size).
        key, frames: of the clip.
        raw: fields that the schema stores as `jpg` and this tar as `npy`.
        gap: bytes between two fields that are not worth fetching along; None leaves that to the store.

    Raises:
        UserError: the tar is missing or cut, or its bytes are damaged.
    """
    order = sorted(places, key=places.__getitem__)
    groups: list[list[str]] = []
    end = 0
    for name in order:
        offset, size = places[name]
        if not groups or (gap is not None and offset - end > gap):
            groups.append([])
        groups[-1].append(name)
        end = offset + size
    values: dict[str, Any] = {}
    try:
        for names in groups:
            data = dataset.store.read_ranges(tar, [places[name] for name in names])
            for name, member in zip(names, data, strict=True):
                values[name] = decode(stored(name, raw), member, frames)
    except FileNotFoundError:
        raise UserError(f"{dataset.uri}/{tar}: missing; run `f2v verify`") from None
    except SchemaError as error:
        raise UserError(f"{dataset.uri}/{tar}: {key}: {error}; run `f2v verify`") from None
    return {name: values[name] for name in places}

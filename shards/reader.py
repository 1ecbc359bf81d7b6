"""Single fields out of packed shards by byte offset, without reading the rest."""

from __future__ import annotations

from collections.abc import Sequence
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
    values: dict[str, Any] = {}
    try:
        for name in names:
            if name not in clip.members:
                raise UserError(f"{dataset.uri}: field {name!r} was not packed; add it to pack.fields and build")
        data = dataset.store.read_ranges(shard.name, [clip.members[name] for name in names])
        for name, member in zip(names, data, strict=True):
            values[name] = decode(stored(name, shard.raw), member, clip.frames)
    except FileNotFoundError:
        raise UserError(f"{dataset.uri}/{shard.name}: missing; run `f2v verify`") from None
    except SchemaError as error:
        raise UserError(f"{dataset.uri}/{shard.name}: {clip.key}: {error}; run `f2v verify`") from None
    return values

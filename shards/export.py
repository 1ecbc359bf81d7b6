"""Plain tars for others: chosen fields of chosen splits, without the rest of the dataset."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from shards.config import Config
from shards.dataset import Dataset
from shards.errors import UserError
from shards.manifest import PackedShard
from shards.progress import Progress
from shards.schema import stored
from shards.storage import is_remote, open_store
from shards.tar import write_tar

LISTING = "shards.json"


class ExportedShard(Config):
    """A tar of an export; `raw` names fields that the schema stores as `jpg` and this tar as `npy`."""

    name: str
    split: str
    clips: int
    bytes: int
    sha256: str
    raw: list[str] = []


class Export(Config):
    """`shards.json` of an export, written last."""

    fields: list[str]
    shards: list[ExportedShard]


def export(uri: str, target: str, fields: Sequence[str], splits: Sequence[str] = ()) -> Export:
    """Write `target`/<split>-000000.tar ... with `fields` of every packed clip, and `shards.json` when all are there.

    Args:
        target: an empty or new place, at any URI.
        fields: schema field names.
        splits: all, if empty.

    Raises:
        UserError: a field that was not packed, a split without clips, a target that holds something.
    """
    dataset = Dataset(uri)
    index = dataset.index()
    fields = list(dict.fromkeys(fields))
    unknown = [name for name in fields if name not in index.fields]
    if unknown or not fields:
        wrong = f"no field {unknown[0]!r} in these shards" if unknown else "no fields"
        raise UserError(f"{uri}: {wrong}; choose from {', '.join(index.fields)}")
    known = sorted({shard.split for shard in index.shards})
    for split in splits:
        if split not in known:
            raise UserError(f"{uri}: no clips in split {split!r}; there are {', '.join(known) or 'none'}")
    chosen = [shard for shard in index.shards if not splits or shard.split in splits]
    store = open_store(target)
    inner, outer = (at.uri if is_remote(at.uri) else os.path.realpath(at.uri) for at in (store, dataset.store))
    if f"{inner}/".startswith(f"{outer}/"):
        raise UserError(f"{target}: lies inside the dataset; name a place outside")
    # What an export of the same shards left when it was stopped is written anew.
    foreign = {found.name for found in store.list()} - {f"{shard.shard}.tar" for shard in chosen}
    if foreign:
        raise UserError(f"{target}: holds {min(foreign)}; name a new or empty place")
    done = []
    with Progress("export", sum(len(shard.clips) for shard in chosen), "clips") as progress:
        for shard in chosen:
            with store.draft() as draft:
                written = write_tar(draft.stream, _members(dataset, shard, fields, progress))
                draft.publish(f"{shard.shard}.tar")
            done.append(
                ExportedShard(
                    name=f"{shard.shard}.tar",
                    split=shard.split,
                    clips=len(shard.clips),
                    bytes=written.bytes,
                    sha256=written.sha256,
                    raw=[name for name in fields if name in shard.raw],
                )
            )
    listing = Export(fields=fields, shards=done)
    store.write(LISTING, listing.model_dump_json(indent=1).encode())
    return listing


def _members(
    dataset: Dataset, shard: PackedShard, fields: Sequence[str], progress: Progress
) -> Iterator[tuple[str, bytes]]:
    suffixes = {name: stored(name, shard.raw).suffix for name in fields}
    ordered = sorted(fields, key=suffixes.__getitem__)
    for clip in shard.clips:
        try:
            data = dataset.store.read_ranges(shard.name, [clip.members[name] for name in ordered])
        except FileNotFoundError:
            raise UserError(f"{dataset.uri}/{shard.name}: missing; run `f2v verify`") from None
        yield from ((f"{clip.key}.{suffixes[name]}", member) for name, member in zip(ordered, data, strict=True))
        progress.advance()

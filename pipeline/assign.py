"""Which shard a clip lies in: decided once, when the clip is first seen."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from pipeline.stage import Clip
from shards.dataset import ClipRow
from shards.manifest import split_of


def assign_shards(clips: Sequence[Clip], shard_clips: int, previous: Iterable[ClipRow]) -> dict[str, list[Clip]]:
    """Shard name -> its clips ordered by key.

    A clip known from `previous` stays in its shard, so that adding clips leaves the shards before them alone. New
    clips fill new shards, per split, in the order of a hash of their keys: neighbours in the source (one speaker, one
    video) spread over shards.
    """
    homes = {row.key: row.shard for row in previous}
    shards: dict[str, list[Clip]] = {}
    fresh: dict[str, list[Clip]] = {}
    for clip in clips:
        home = homes.get(clip.key)
        if home is not None and split_of(home) == clip.split:
            shards.setdefault(home, []).append(clip)
        else:
            fresh.setdefault(clip.split, []).append(clip)
    used: dict[str, int] = {}
    for name in set(homes.values()):
        split, number = split_of(name), int(name.rsplit("-", 1)[1])
        used[split] = max(used.get(split, -1), number)
    for split, members in fresh.items():
        members.sort(key=lambda clip: hashlib.sha256(clip.key.encode()).digest())
        first = used.get(split, -1) + 1
        for number, begin in enumerate(range(0, len(members), shard_clips), first):
            shards[f"{split}-{number:06d}"] = members[begin : begin + shard_clips]
    return {name: sorted(shards[name], key=lambda clip: clip.key) for name in sorted(shards)}

"""Which shard a clip lies in: decided once, when the clip is first seen."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence

from pipeline.stage import Clip
from shards.dataset import ClipRow
from shards.errors import UserError
from shards.manifest import split_of


def assign_shards(clips: Sequence[Clip], shard_clips: int, previous: Iterable[ClipRow]) -> dict[str, list[Clip]]:
    """Shard name -> its clips ordered by key.

    A clip known from `previous` stays in its shard, so that adding clips leaves the shards before them alone. New
    clips fill new shards, per split, in the order of a hash of their keys: neighbours in the source (one speaker, one
    video) spread over shards.

    Raises:
        UserError: `previous` is damaged.
    """
    homes = {row.key: row.shard for row in previous}
    for name in set(homes.values()):
        if not re.fullmatch(r"\w+-\d{6,}", name):
            raise UserError(f"the clip table names a shard {name!r}, which no build made; run `f2v verify`")
    shards: dict[str, list[Clip]] = {}
    fresh: dict[str, list[Clip]] = {}
    moved: dict[str, list[Clip]] = {}
    for clip in clips:
        home = homes.get(clip.key)
        if home is not None and split_of(home) == clip.split:
            shards.setdefault(home, []).append(clip)
        else:
            (fresh if home is None else moved).setdefault(clip.split, []).append(clip)
    used: dict[str, int] = {}
    for name in set(homes.values()):
        split, number = split_of(name), int(name.rsplit("-", 1)[1])
        used[split] = max(used.get(split, -1), number)
    # Clips that went to another split come after new ones and never share a shard with them: new clips are settled
    # before the build, moved ones by its commit, and an interruption between the two must not matter.
    for kind in (fresh, moved):
        for split, members in kind.items():
            members.sort(key=lambda clip: hashlib.sha256(clip.key.encode()).digest())
            for begin in range(0, len(members), shard_clips):
                used[split] = used.get(split, -1) + 1
                shards[f"{split}-{used[split]:06d}"] = members[begin : begin + shard_clips]
    return {name: sorted(shards[name], key=lambda clip: clip.key) for name in sorted(shards)}

"""`status`: what a dataset holds, from its tables alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass

from shards.dataset import Dataset
from shards.schema import VIDEO_RATE


@dataclass(frozen=True)
class SplitStatus:
    """Counts of one split; `hours` of packed clips."""

    clips: int
    hours: float
    shards: int
    bytes: int


@dataclass(frozen=True)
class Status:
    """Counts of a dataset; `quarantined` maps reason code to clips."""

    dataset: str
    profile: str
    splits: dict[str, SplitStatus]
    quarantined: dict[str, int]
    fields: list[str]

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def status(uri: str) -> Status:
    """Read the counts of the dataset at `uri`.

    Raises:
        UserError: no dataset there, or one of another schema.
    """
    dataset = Dataset(uri)
    manifest, index = dataset.manifest(), dataset.index()
    splits = {}
    for split in manifest.splits:
        shards = [shard for shard in index.shards if shard.split == split]
        frames = sum(clip.frames for shard in shards for clip in shard.clips)
        splits[split] = SplitStatus(
            clips=sum(len(shard.clips) for shard in shards),
            hours=frames / VIDEO_RATE / 3600,
            shards=len(shards),
            bytes=sum(shard.bytes for shard in shards),
        )
    reasons = Counter(row.reason for row in dataset.quarantine())
    return Status(uri, manifest.profile, splits, dict(sorted(reasons.items())), index.fields)

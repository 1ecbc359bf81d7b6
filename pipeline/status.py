"""`status`: what a dataset holds, from its manifest alone."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import asdict, dataclass

from shards.dataset import Dataset
from shards.manifest import Manifest, PackRef, split_of
from shards.schema import VIDEO_RATE


@dataclass(frozen=True)
class SplitStatus:
    """Counts of one split: packed clips and their hours, clips of shards that are not built yet, packed shards."""

    clips: int
    hours: float
    quarantined: int
    pending: int
    shards: int
    bytes: int


@dataclass(frozen=True)
class Status:
    """Counts of a dataset.

    Attributes:
        quarantined: reason code -> clips.
        segmented: whether the source's recordings are cut into clips.
        columns, column_bytes: current columns.
        mixed: stage -> number of recipes, where shards were not all made in one way.
        behind: stage -> shards in which it follows from columns that were made anew since.
    """

    dataset: str
    profile: str
    source: str
    segmented: bool
    splits: dict[str, SplitStatus]
    quarantined: dict[str, int]
    columns: int
    column_bytes: int
    mixed: dict[str, int]
    behind: dict[str, int]

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def status(uri: str) -> Status:
    """Read the counts of the dataset at `uri`.

    Raises:
        UserError: no dataset there, or one of another schema.
    """
    manifest = Dataset(uri).manifest()
    reasons: Counter[str] = Counter()
    for pack in manifest.packs.values():
        reasons.update(pack.refused)
    refs = [ref for row in manifest.columns.values() for ref in row.values()]
    return Status(
        dataset=uri,
        profile=manifest.profile,
        source=manifest.source,
        segmented=manifest.config.get("segment", {}).get("enabled", False),
        splits=_splits(manifest),
        quarantined=dict(sorted(reasons.items())),
        columns=len(refs),
        column_bytes=sum(ref.bytes for ref in refs),
        behind=dict(Counter(stage for pack in manifest.packs.values() for stage in pack.behind)),
        mixed={stage: len(recipes) for stage, recipes in manifest.recipes.items() if len(recipes) > 1},
    )


def _splits(manifest: Manifest) -> dict[str, SplitStatus]:
    packs: dict[str, list[PackRef]] = defaultdict(list)
    pending: Counter[str] = Counter()
    for shard, clips in manifest.shards.items():
        if shard in manifest.packs:
            packs[split_of(shard)].append(manifest.packs[shard])
        else:
            pending[split_of(shard)] += clips
    return {
        split: SplitStatus(
            clips=sum(pack.clips for pack in packs[split]),
            hours=sum(pack.frames for pack in packs[split]) / VIDEO_RATE / 3600,
            quarantined=sum(sum(pack.refused.values()) for pack in packs[split]),
            pending=pending[split],
            shards=sum(pack.name is not None for pack in packs[split]),
            bytes=sum(pack.bytes for pack in packs[split]),
        )
        for split in sorted({*packs, *pending})
    }

"""`status`: what a dataset holds, from its manifest; of recordings that are cut, also what is in none of the clips."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from shards.dataset import Dataset
from shards.manifest import Manifest, PackRef, split_of
from shards.schema import VIDEO_RATE

if TYPE_CHECKING:
    from pipeline.recordings import Scan


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
        networks: stage -> the network that its current columns were made with; several, where they differ.
        segmented: whether the source's recordings are cut into clips; if so, `recordings` and `recorded` are how many
            there are and their seconds, and `left_out` says of how many seconds no clip was made, by reason.
        columns, column_bytes: current columns.
        mixed: stage -> number of recipes, where shards were not all made in one way.
        behind: stage -> shards in which it follows from columns that were made anew since.
        raw: field -> packed shards that hold it as `npy`, while the schema stores it as `jpg`.
    """

    dataset: str
    profile: str
    source: str
    networks: dict[str, str]
    segmented: bool
    recordings: int
    recorded: float
    left_out: dict[str, float]
    splits: dict[str, SplitStatus]
    quarantined: dict[str, int]
    columns: int
    column_bytes: int
    mixed: dict[str, int]
    behind: dict[str, int]
    raw: dict[str, int]

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def status(uri: str, manifest: Manifest | None = None) -> Status:
    """Read the counts of the dataset at `uri`.

    Args:
        manifest: the state that is meant; None: the current one.

    Raises:
        UserError: no dataset there, or one of another schema; what was found in a recording is damaged.
    """
    dataset = Dataset(uri)
    manifest = manifest or dataset.manifest()
    segmented = manifest.config.get("segment", {}).get("enabled", False)
    scans: list[Scan] = []
    if segmented:
        from pipeline.recordings import scans_of  # brings all stages along

        scans = scans_of(dataset, dataset.clips(manifest))
    left_out: dict[str, float] = defaultdict(float)
    for part in (part for scan in scans for part in scan.left_out):
        left_out[part.reason.value] += part.end - part.start
    reasons: Counter[str] = Counter()
    for pack in manifest.packs.values():
        reasons.update(pack.refused)
    refs = [ref for row in manifest.columns.values() for ref in row.values()]
    return Status(
        dataset=uri,
        profile=manifest.profile,
        source=manifest.source,
        networks=_networks(manifest),
        segmented=segmented,
        recordings=len(scans),
        recorded=sum(scan.frames for scan in scans) / VIDEO_RATE,
        left_out={reason: round(seconds, 3) for reason, seconds in sorted(left_out.items())},
        splits=_splits(manifest),
        quarantined=dict(sorted(reasons.items())),
        columns=len(refs),
        column_bytes=sum(ref.bytes for ref in refs),
        raw=dict(Counter(name for pack in manifest.packs.values() for name in pack.raw)),
        behind=dict(Counter(stage for pack in manifest.packs.values() for stage in pack.behind)),
        mixed={stage: len(recipes) for stage, recipes in manifest.recipes.items() if len(recipes) > 1},
    )


def _networks(manifest: Manifest) -> dict[str, str]:
    found = {}
    for stage, refs in manifest.columns.items():
        made = [manifest.recipes[stage][key].settings for key in sorted({ref.recipe for ref in refs.values()})]
        names = {str(settings.get("network") or settings.get("encoder") or "") for settings in made} - {""}
        if names:
            found[stage] = " and ".join(sorted(names))
    return found


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

"""What a dataset no longer needs: objects that neither the current manifest nor a recent one names, and what was found
in recordings that neither of their clip tables names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone

from shards.dataset import Dataset
from shards.manifest import COPIES, HISTORY, MANIFEST, OWN, RUNS, SEGMENTS, Manifest
from shards.storage import LOCK, Object


@dataclass(frozen=True)
class Garbage:
    """What `gc` found.

    Attributes:
        old: objects to delete.
        young: objects that no manifest names and that are younger than the grace period: a build at work may be about
            to commit them.
        kept: objects that only manifests named which were replaced within the grace period: a reader may be at work
            on them.
        foreign: names that no build gives; they are never deleted.
    """

    old: list[Object] = field(default_factory=list)
    young: list[Object] = field(default_factory=list)
    kept: list[Object] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)


def find_garbage(dataset: Dataset, grace: timedelta) -> Garbage:
    """Sort the objects of a dataset by who still needs them.

    Raises:
        UserError: no dataset there, or the copy of a recent manifest is damaged.
    """
    objects = sorted(dataset.store.list(), key=lambda found: found.name)
    # Read after the listing: what is committed in between is not in the list, or named here.
    current = dataset.manifest()
    limit = datetime.now(timezone.utc) - grace
    recent: set[str] = set()
    recently: list[Manifest] = []
    # Listed after the current manifest was read: one that it replaced a moment ago has its copy by now.
    for copy in dataset.store.list(HISTORY):
        if copy.modified > limit and OWN.fullmatch(copy.name):
            replaced = dataset.replaced(copy.name)
            recent |= {copy.name, *(replaced.objects() if replaced else ())}
            recently += [replaced] if replaced else []
    records = [found.name for found in objects if found.name.startswith(SEGMENTS) and OWN.fullmatch(found.name)]
    scanned = _of_recordings(dataset, records, [current])
    recent |= _of_recordings(dataset, [name for name in records if name not in scanned], recently)
    needed = {MANIFEST, LOCK, *COPIES, *current.objects(), *scanned}
    garbage = Garbage()
    for found in objects:
        if not OWN.fullmatch(found.name):
            garbage.foreign.append(found.name)
        elif found.name in needed or found.name.startswith(RUNS):
            continue
        elif found.name in recent:
            garbage.kept.append(found)
        elif found.modified > limit:
            garbage.young.append(found)
        else:
            garbage.old.append(found)
    return garbage


def delete_garbage(dataset: Dataset, objects: Sequence[Object]) -> None:
    """Delete objects, except what the manifest of this moment names. A run that is cut off leaves the rest for the next
    one: they are found by their names and times alone."""
    current = dataset.manifest()
    needed = {*current.objects(), *_of_recordings(dataset, [found.name for found in objects], [current])}
    dataset.store.delete([found.name for found in objects if found.name not in needed])


def _of_recordings(dataset: Dataset, names: Sequence[str], manifests: Sequence[Manifest]) -> set[str]:
    """Those of the names that say what was found in media of the manifests' clips, by whatever settings."""
    left = {name for name in names if name.startswith(SEGMENTS)}
    found: set[str] = set()
    tables = {manifest.clips.name: manifest for manifest in manifests}
    for manifest in tables.values():
        if left:
            media = {row.digest[:16] for row in dataset.clips(manifest)}
            found |= {name for name in left if name.removeprefix(SEGMENTS)[:16] in media}
            left -= found
    return found

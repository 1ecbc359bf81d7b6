"""What a dataset no longer needs: objects that neither the current manifest nor a recent one names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone

from shards.dataset import Dataset
from shards.manifest import COPIES, HISTORY, MANIFEST, OWN, SEGMENTS
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
    # Listed after the current manifest was read: one that it replaced a moment ago has its copy by now.
    for copy in dataset.store.list(HISTORY):
        if copy.modified > limit and OWN.fullmatch(copy.name):
            replaced = dataset.replaced(copy.name)
            recent |= {copy.name, *(replaced.objects() if replaced else ())}
    needed = {MANIFEST, LOCK, *COPIES, *current.objects()}
    garbage = Garbage()
    for found in objects:
        if not OWN.fullmatch(found.name):
            garbage.foreign.append(found.name)
        elif found.name in needed or found.name.startswith(SEGMENTS):
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
    needed = dataset.manifest().objects()
    dataset.store.delete([found.name for found in objects if found.name not in needed])

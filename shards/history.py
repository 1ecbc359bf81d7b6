"""What a dataset no longer needs: objects that neither the current manifest nor a recent one names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone

from pydantic import ValidationError

from shards.dataset import Dataset
from shards.manifest import COPIES, MANIFEST, OWN, Manifest
from shards.schema import SCHEMA_VERSION
from shards.storage import LOCK, Object

HISTORY = "manifests/"


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
        UserError: no dataset there, or a manifest of the history is damaged.
    """
    objects = sorted(dataset.store.list(), key=lambda found: found.name)
    # Read after the listing: what is committed in between is not in the list, or named here.
    current = dataset.manifest()
    limit = datetime.now(timezone.utc) - grace
    history = sorted((o for o in objects if o.name.startswith(HISTORY)), key=lambda found: found.modified)
    needed = {MANIFEST, LOCK, *COPIES, *current.objects()}
    recent: set[str] = set()
    for position, entry in enumerate(history):
        # A manifest was replaced when the next one was written; the last one may be about to be committed.
        replaced = history[position + 1].modified if position + 1 < len(history) else None
        if replaced is None or replaced > limit:
            recent |= {entry.name, *_named(dataset, entry.name)}
    garbage = Garbage()
    for found in objects:
        if not OWN.fullmatch(found.name):
            garbage.foreign.append(found.name)
        elif found.name in needed:
            continue
        elif found.name in recent:
            garbage.kept.append(found)
        elif found.modified > limit:
            garbage.young.append(found)
        else:
            garbage.old.append(found)
    return garbage


def delete_garbage(dataset: Dataset, objects: Sequence[Object]) -> None:
    """Delete objects, except what the manifest of this moment names; manifests of the history go last, so that a run
    that is cut off finds the rest again."""
    needed = dataset.manifest().objects()
    ordered = sorted(objects, key=lambda found: found.name.startswith(HISTORY))
    dataset.store.delete([found.name for found in ordered if found.name not in needed])


def _named(dataset: Dataset, name: str) -> set[str]:
    try:
        tree = json.loads(dataset.store.read(name))
        if not isinstance(tree, dict) or tree.get("schema_version") != SCHEMA_VERSION:
            return set()
        return set(Manifest.model_validate(tree).objects())
    except (FileNotFoundError, ValueError, ValidationError):
        return set()

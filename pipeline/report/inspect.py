"""One clip: where it is, what became of it, and what is stored of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pipeline.report.clip_view import View
from pipeline.report.figures import measure
from pipeline.report.shelf import Shelf
from shards.errors import UserError
from shards.schema import FIELDS


@dataclass(frozen=True)
class Stored:
    """A field of a clip as it lies somewhere: the tar, its bytes, shape and dtype, and the range of its finite values;
    None where it has none."""

    tar: str
    bytes: int
    dtype: str
    shape: list[int]
    low: float | None
    mean: float | None
    high: float | None
    missing: int


@dataclass(frozen=True)
class Inspection:
    """A clip: as it is shown, what each field is, its figures by name, and why fields of it could not be read; the
    view's notes name these faults too."""

    view: View
    fields: dict[str, Stored]
    figures: dict[str, float]
    faults: list[str]

    def as_dict(self) -> dict[str, Any]:
        """All of it, to be written as JSON."""
        refused = self.view.refused
        return {
            "clip": asdict(self.view.row),
            "tar": self.view.tar,
            "refused": asdict(refused) if refused else None,
            "notes": list(self.view.notes),
            "fields": {name: asdict(stored) for name, stored in self.fields.items()},
            "figures": self.figures,
            "track": self.view.values.get("track"),
            "sync": self.view.values.get("sync"),
        }


def inspect(shelf: Shelf, key: str) -> Inspection:
    """All that is known of a clip. What cannot be read is among the faults.

    Raises:
        UserError: no such clip.
    """
    row = shelf.row(key)
    fields: dict[str, Stored] = {}
    values: dict[str, Any] = {}
    faults: dict[str, None] = {}
    for name in FIELDS:
        try:
            places = shelf.places(key, (name,))
            values |= shelf.read(key, (name,))
        except UserError as error:
            faults[str(error)] = None
            continue
        for place in places:
            fields[name] = describe(place.tar, place.members[name][1], values[name])
    pending = ["its shard is not built yet; `f2v build` does it"] if row.state == "pending" else []
    view = View(row, values, (), shelf.tar(key), shelf.refused.get(key), [*faults, *pending])
    figures = measure(key, row.frames, values).figures
    figures = {name: value for name, value in figures.items() if name != "seconds"}
    return Inspection(view, fields, figures, [*faults])


def describe(tar: str, count: int, value: Any) -> Stored:
    """What a field's value is."""
    if not isinstance(value, np.ndarray):
        return Stored(tar, count, type(value).__name__, [], None, None, None, 0)
    finite = value[np.isfinite(value)] if value.dtype.kind == "f" else value.ravel()
    missing = value.size - len(finite)
    if not len(finite):
        return Stored(tar, count, str(value.dtype), list(value.shape), None, None, None, missing)
    low, mean, high = float(finite.min()), float(finite.mean(dtype=np.float64)), float(finite.max())
    return Stored(tar, count, str(value.dtype), list(value.shape), low, mean, high, missing)

"""Looking at a dataset: counts of all of it, figures of a sample, and the clips that are worth a look."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from pipeline.report.figures import FIGURES, OF_FRAMES, SMALL, Measured, measure
from pipeline.report.shelf import Shelf
from pipeline.status import Status, status
from shards.dataset import QuarantineRow
from shards.errors import UserError
from shards.manifest import MANIFEST
from shards.progress import Progress
from shards.schema import VIDEO_RATE

READERS = 16
"""Shards that are read at once."""
BINS = 32
"""Of a histogram at most."""
EXAMPLES = 2


@dataclass(frozen=True)
class Spread:
    """A distribution: how many values, their quantiles, and a histogram of len(edges) - 1 bins."""

    count: int
    mean: float
    low: float
    p5: float
    median: float
    p95: float
    high: float
    edges: list[float]
    counts: list[int]


@dataclass(frozen=True)
class Units:
    """Use of the units in the clips that were looked at.

    Attributes:
        clusters: how many units there are.
        unused: how many of them never came.
        perplexity: exp of the entropy of their frequencies, the number of equally frequent units that would be as
            surprising.
        counts: of each unit that came, from the most frequent on.
        most: number of the most frequent unit, and its share of the frames.
    """

    frames: int
    clusters: int
    used: int
    unused: int
    perplexity: float
    counts: list[int]
    most: tuple[int, float]


@dataclass(frozen=True)
class Group:
    """Clips in quarantine for one reason at one stage; `examples` are keys with their messages."""

    reason: str
    stage: str
    clips: int
    retriable: int
    examples: list[tuple[str, str]]


@dataclass(frozen=True)
class Findings:
    """What was seen of a dataset.

    Attributes:
        modified: when its manifest was last replaced, UTC.
        split: the one that was looked at; None for all.
        speakers: split -> names of speakers among the packed clips.
        clips: packed clips that the figures are about, of which `sampled` were read.
        spreads: distributions by name, of clips as in `FIGURES` and of frames as in `OF_FRAMES`.
        measured: of each clip that was read.
        faults: clip -> why it could not be read.
        chosen: clips to show -> why each, from the worst to the random ones.
    """

    status: Status
    modified: str
    split: str | None
    seed: int
    speakers: dict[str, int]
    quarantine: list[Group]
    clips: int
    sampled: int
    spreads: dict[str, Spread]
    units: Units | None
    measured: dict[str, Measured] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)
    chosen: dict[str, list[str]] = field(default_factory=dict)

    def numbers(self) -> dict[str, Any]:
        """All but the clips' own figures, to be written as JSON."""
        tree = {name: getattr(self, name) for name in ("modified", "split", "seed", "speakers", "clips", "sampled")}
        return {
            "status": self.status.as_dict(),
            **tree,
            "quarantine": [asdict(group) for group in self.quarantine],
            "spreads": {name: asdict(spread) for name, spread in self.spreads.items()},
            "units": asdict(self.units) if self.units else None,
            "chosen": self.chosen,
            "faults": self.faults,
        }


def look(shelf: Shelf, split: str | None, sample: int, clips: int, seed: int) -> Findings:
    """Look at a dataset.

    Args:
        split: only this one.
        sample: clips whose small fields are read, drawn at random.
        clips: how many to choose for a closer look: half of them the worst of the sample, the others at random.

    Raises:
        UserError: no such split; no clip of the sample can be read.
    """
    dataset = shelf.dataset
    found = status(dataset.uri, shelf.manifest)
    if split is not None and split not in found.splits:
        raise UserError(f"{dataset.uri}: no split {split!r}; it has {', '.join(found.splits) or 'none'}")
    keys = [key for key in shelf.frames if split in (None, shelf.rows[key].split)]
    generator = random.Random(seed)
    drawn = generator.sample(keys, min(sample, len(keys)))
    measured, faults = _measure(shelf, drawn)
    if drawn and not measured:
        raise UserError(next(iter(faults.values())))
    stage = shelf.manifest.config.get("sync") or {}
    worst = find_worst(measured, clips // 2, float(stage.get("min_confidence", 0.5)))
    random_ones = [key for key in drawn if key in measured and key not in worst][: clips - len(worst)]
    modified = dataset.store.find(MANIFEST)
    return Findings(
        status=found,
        modified=modified.modified.strftime("%Y-%m-%d %H:%M UTC") if modified else "",
        split=split,
        seed=seed,
        speakers=_speakers(shelf),
        quarantine=group_quarantine([row for row in shelf.refused.values() if split in (None, row.split)]),
        clips=len(keys),
        sampled=len(measured),
        spreads=_spreads([shelf.frames[key] / VIDEO_RATE for key in keys], list(measured.values())),
        units=count_units([one.units for one in measured.values()], _clusters(shelf)),
        measured=measured,
        faults=faults,
        chosen={**worst, **{key: ["drawn at random"] for key in random_ones}},
    )


def _measure(shelf: Shelf, keys: Sequence[str]) -> tuple[dict[str, Measured], dict[str, str]]:
    """Figures of each clip that can be read, and why the others cannot, in the order of `keys`."""
    shards: dict[str, list[str]] = defaultdict(list)
    for key in keys:
        shards[shelf.rows[key].shard].append(key)
    found: dict[str, Measured | str] = {}

    def read(members: list[str]) -> None:
        for key in members:
            try:
                found[key] = measure(key, shelf.frames[key], shelf.read(key, SMALL, small=True))
            except UserError as error:
                found[key] = str(error)
            progress.advance()

    with Progress("look", len(keys), "clips") as progress, ThreadPoolExecutor(READERS) as pool:
        list(pool.map(read, shards.values()))
    measured = {key: one for key in keys if isinstance(one := found[key], Measured)}
    return measured, {key: one for key in keys if isinstance(one := found[key], str)}


def find_worst(measured: dict[str, Measured], count: int, least: float) -> dict[str, list[str]]:
    """`count` clips at the bad ends of the figures, in turn one of each figure, and why they are there.

    Args:
        least: confidence below which an offset is not told.
    """
    ranked: dict[str, list[str]] = {}
    for name, figure in FIGURES.items():
        if figure.worst is None:
            continue
        values = {key: one.figures[name] for key, one in measured.items() if name in one.figures}
        if name == "offset":
            values = {
                key: abs(value) for key, value in values.items() if measured[key].figures.get("confidence", 0) >= least
            }
        if len(set(values.values())) > 1:
            sign = -1 if figure.worst == "high" else 1
            ranked[name] = [key for _, key in sorted((sign * value, key) for key, value in values.items())]
    chosen: dict[str, list[str]] = {}
    for rank in range(max(map(len, ranked.values()), default=0)):
        for name, keys in ranked.items():
            if rank < len(keys) and (keys[rank] in chosen or len(chosen) < count):
                place = f"{FIGURES[name].why}, rank {rank + 1}" if rank else FIGURES[name].why
                words = f"{place}: {measured[keys[rank]].figures[name]:.3g} {FIGURES[name].unit}"
                chosen.setdefault(keys[rank], []).append(words.rstrip())
        if len(chosen) >= count:
            break
    return chosen


def _spreads(seconds: Sequence[float], measured: Sequence[Measured]) -> dict[str, Spread]:
    """Distributions of what is there; durations are those of all clips."""
    values: dict[str, np.ndarray] = {"seconds": np.array(seconds)}
    for name in OF_FRAMES:
        series = [one.frames[name] for one in measured if name in one.frames]
        values[name] = np.concatenate(series).astype(np.float64) if series else np.zeros(0)
    for name in FIGURES:
        if name != "seconds":
            values[name] = np.array([one.figures[name] for one in measured if name in one.figures])
    steps = {"seconds": 1 / VIDEO_RATE}
    return {name: spread(one, steps.get(name)) for name, one in values.items() if len(one)}


def spread(values: np.ndarray, step: float | None = None) -> Spread:
    """Distribution of one value or more; `step` is what they are multiples of, so that bins hold equally many."""
    low, p5, median, p95, high = np.percentile(values, [0, 5, 50, 95, 100]).tolist()
    # Rice's rule: few values make few bins.
    bins = min(BINS, math.ceil(2 * len(values) ** (1 / 3)))
    # Between values that lie too close together there is no room for the edges of bins.
    size = max(1.0, abs(low), abs(high))
    room = 0.0 if high - low > 1e-9 * size else max(0.5, 1e-6 * size)
    begin, end = low - room, high + room
    if step is not None:
        width = step * max(1, math.ceil((high - low + step) / step / bins - 1e-6))
        bins = math.ceil((high - low + step) / width - 1e-6)
        begin, end = low - step / 2, low - step / 2 + bins * width
    counts, edges = np.histogram(values, bins, (begin, end))
    return Spread(
        len(values), float(values.mean()), low, p5, median, p95, high, edges.tolist(), [int(n) for n in counts]
    )


def count_units(counts: Sequence[np.ndarray], clusters: int) -> Units | None:
    """Use of units from how often each came in each clip; None where none did."""
    size = max([clusters, *map(len, counts)])
    total = np.zeros(size, np.int64)
    for one in counts:
        total[: len(one)] += one
    frames = int(total.sum())
    if not frames:
        return None
    shares = total[total > 0] / frames
    order = np.argsort(-total, kind="stable")
    return Units(
        frames=frames,
        clusters=size,
        used=len(shares),
        unused=size - len(shares),
        perplexity=float(np.exp(-(shares * np.log(shares)).sum())),
        counts=[int(total[unit]) for unit in order[: len(shares)]],
        most=(int(order[0]), float(total[order[0]] / frames)),
    )


def _clusters(shelf: Shelf) -> int:
    """Units of the codebook, as the recipes say; 0 where they do not."""
    recipes = shelf.manifest.recipes.get("speech", {}).values()
    return max((int(recipe.settings.get("clusters") or 0) for recipe in recipes), default=0)


def _speakers(shelf: Shelf) -> dict[str, int]:
    names: dict[str, set[str]] = defaultdict(set)
    for key in shelf.frames:
        row = shelf.rows[key]
        if row.speaker:
            names[row.split].add(row.speaker)
    return {split: len(found) for split, found in sorted(names.items())}


def group_quarantine(rows: Sequence[QuarantineRow]) -> list[Group]:
    """Clips in quarantine by reason and stage, most frequent first."""
    groups: dict[tuple[str, str], list[QuarantineRow]] = defaultdict(list)
    for row in rows:
        groups[row.reason, row.stage].append(row)
    sizes = Counter({name: len(members) for name, members in groups.items()})
    return [
        Group(
            reason=reason,
            stage=stage,
            clips=clips,
            retriable=sum(row.retriable for row in groups[reason, stage]),
            examples=[(row.key, row.message) for row in groups[reason, stage][:EXAMPLES]],
        )
        for (reason, stage), clips in sorted(sizes.items(), key=lambda item: (-item[1], item[0]))
    ]

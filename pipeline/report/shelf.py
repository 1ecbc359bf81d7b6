"""Where the fields of each clip lie: in the packed shards, else in the columns of the stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

from pipeline.columns import Column, load_column
from shards.dataset import ClipRow, Dataset, QuarantineRow
from shards.errors import UserError
from shards.manifest import Index, Manifest, PackedClip, PackedShard
from shards.reader import read_places
from shards.schema import FIELDS, SchemaError, check_sample

GAP = 64 << 10
"""Bytes between two small fields of a clip that are not fetched along: the pictures."""
SUGGESTED = 3


@dataclass(frozen=True)
class Place:
    """Where fields of a clip lie: the tar, field -> (byte offset, size), F, and the fields that are `npy` there."""

    tar: str
    members: dict[str, tuple[int, int]]
    frames: int
    raw: tuple[str, ...] = ()


class Shelf:
    """One state of a dataset: its tables, and its clips to be read one by one.

    Attributes:
        rows: every clip of the source, by key.
        refused: clips in quarantine, by key.
        frames: F of each packed clip, by key, in the order of the index.
    """

    def __init__(self, dataset: Dataset) -> None:
        """Raises UserError: no dataset there, or a table is missing or damaged."""
        self.dataset = dataset
        self.manifest: Manifest = dataset.manifest()
        self.index: Index
        self.index, listed = dataset.index_and_clips(self.manifest.index.name)
        self.rows: dict[str, ClipRow] = {row.key: row for row in dataset.clips(self.manifest)}
        self.refused: dict[str, QuarantineRow] = {row.key: row for row in dataset.quarantine(self.manifest)}
        self._packed: dict[str, tuple[PackedShard, Any]] = {}
        self._columns: dict[tuple[str, str], Column | None] = {}
        for shard, clips in zip(self.index.shards, listed, strict=True):
            for clip in self._list(clips):
                self._packed[clip["key"]] = shard, clip
        lost = self._packed.keys() - self.rows.keys()
        if lost:
            raise UserError(f"{dataset.uri}: {min(lost)} is packed but not in the table of clips; run `f2v verify`")
        self.frames: dict[str, int] = {key: clip["frames"] for key, (_, clip) in self._packed.items()}

    def _list(self, clips: Any) -> list[Any]:
        # Models of all clips of a large dataset would take minutes; those that are read are checked then.
        good = isinstance(clips, list) and all(
            isinstance(clip, dict) and isinstance(clip.get("key"), str) and isinstance(clip.get("frames"), int)
            for clip in clips
        )
        if not good:
            raise UserError(
                f"{self.dataset.uri}/{self.manifest.index.name}: damaged, no list of clips; run `f2v verify`"
            )
        return list(clips)

    def row(self, key: str) -> ClipRow:
        """Raises UserError: no such clip."""
        if key in self.rows:
            return self.rows[key]
        near = get_close_matches(key, self.rows, SUGGESTED) or [
            name for name in self.rows if key.rpartition("/")[2] in name
        ]
        hint = f"; near it: {', '.join(near[:SUGGESTED])}" if near else ""
        raise UserError(f"{self.dataset.uri}: no clip {key!r}{hint} (clips.parquet lists the keys)")

    def tar(self, key: str) -> str | None:
        """Name of the packed shard of a clip; None where it is in none."""
        return self._packed[key][0].name if key in self._packed else None

    def places(self, key: str, names: Sequence[str]) -> list[Place]:
        """Where the fields `names` of a clip lie; those that nobody wrote are left out.

        Raises:
            UserError: the record of a column or the entry in the index is damaged.
        """
        found: list[Place] = []
        frames: int | None = None
        left = list(names)
        if key in self._packed:
            shard, tree = self._packed[key]
            try:
                clip = PackedClip.model_validate(tree)
            except ValidationError:
                raise UserError(f"{self.dataset.uri}/{self.manifest.index.name}: {key}: damaged entry") from None
            frames = clip.frames
            here = {name: clip.members[name] for name in names if name in clip.members}
            left = [name for name in names if name not in here]
            found.append(Place(shard.name, here, clip.frames, tuple(shard.raw)))
        for stage in dict.fromkeys(FIELDS[name].stage for name in left):
            column = self.column(stage, self.rows[key].shard)
            entry = column.clips.get(key) if column else None
            # A column that was made anew since the shard was packed may have another length.
            if column and entry and frames in (None, entry.frames):
                here = {name: entry.members[name] for name in left if name in entry.members}
                found.append(Place(column.tar, here, entry.frames))
        return [place for place in found if place.members]

    def column(self, stage: str, shard: str) -> Column | None:
        """Record of the current column of a stage and shard; None where there is none."""
        ref = self.manifest.columns.get(stage, {}).get(shard)
        if ref is None:
            return None
        if (stage, shard) not in self._columns:
            self._columns[stage, shard] = load_column(self.dataset, stage, shard, ref.fingerprint)
        return self._columns[stage, shard]

    def read(self, key: str, names: Sequence[str], small: bool = False) -> dict[str, Any]:
        """Decoded fields of a clip, those of `names` that are there.

        Args:
            small: fetch nothing that lies between them, at the price of more requests.

        Raises:
            UserError: a shard or column is missing, cut or damaged.
        """
        values: dict[str, Any] = {}
        for place in self.places(key, names):
            gap = GAP if small else None
            found = read_places(self.dataset, place.tar, place.members, key, place.frames, place.raw, gap)
            try:
                check_sample(found, place.frames)
            except SchemaError as error:
                raise UserError(f"{self.dataset.uri}/{place.tar}: {key}: {error}; run `f2v verify`") from None
            values |= found
        return values

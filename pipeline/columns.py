"""Columns: one stage's fields for the clips of one shard, as an immutable WebDataset tar named by its fingerprint.

Beside each tar lies a `.json` record with the clips that are in, the ones that were refused and why, the byte offsets,
and what it took. The record is written last: a column exists when it does.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from pipeline.records import Record, load_record
from pipeline.stage import Reason
from shards.config import Config
from shards.dataset import Dataset
from shards.errors import UserError
from shards.manifest import ColumnRef, Recipe, column_record, column_tar

READ_AHEAD = 8 << 20
"""Bytes of a column that are read at once."""


class Task(Config):
    """One stage over one shard.

    Attributes:
        fingerprint: of the column to make.
        reads: upstream stage -> fingerprint of the column to read.
        media: digest of the shard's clips, for stages that decode media; else empty.
        attempt: counts from 1.
        reuse: fingerprint of a column of the same stage and shard whose kept fields spare the network; it decides what
            the work costs, not what comes out, and is no part of the fingerprint.
    """

    stage: str
    shard: str
    fingerprint: str
    recipe: Recipe
    reads: dict[str, str]
    media: str
    attempt: int
    reuse: str | None = None


class Refused(Config):
    """A clip that the stage refused."""

    key: str
    reason: Reason
    message: str
    traceback: str = ""


class ColumnClip(Config):
    """A clip in the column; `members` maps field name to (byte offset, size)."""

    frames: int
    members: dict[str, tuple[int, int]]


class Column(Record):
    """Record of a column; `widths` are the named widths (`D_identity` ...) that its values have."""

    schema_version: int
    task: Task
    clips: dict[str, ColumnClip]
    refused: list[Refused]
    widths: dict[str, int]
    sha256: str
    bytes: int
    seconds: float

    @property
    def tar(self) -> str:
        """Object name of its tar."""
        return column_tar(self.task.stage, self.task.shard, self.task.fingerprint, self.sha256)

    @property
    def name(self) -> str:
        """Object name of the record."""
        return column_record(self.task.stage, self.task.shard, self.task.fingerprint)

    @property
    def tar_size(self) -> tuple[str, int]:
        """Object name and size of its tar."""
        return self.tar, self.bytes

    def held(self, fields: Collection[str]) -> int:
        """Bytes of its fields among `fields`."""
        return sum(size for clip in self.clips.values() for name, (_, size) in clip.members.items() if name in fields)

    def ref(self, recipe: str) -> ColumnRef:
        """What the manifest says of it; `recipe` is the recipe's key there."""
        return ColumnRef(
            fingerprint=self.task.fingerprint,
            recipe=recipe,
            reads=self.task.reads,
            media=self.task.media,
            attempt=self.task.attempt,
            record=self.digest(),
            sha256=self.sha256,
            bytes=self.bytes,
            clips=len(self.clips),
            refused=len(self.refused),
            seconds=self.seconds,
            reuse=self.task.reuse,
        )


def load_column(dataset: Dataset, stage: str, shard: str, mark: str) -> Column | None:
    """The record of a column, or None where the column does not exist or its tar is not as long as the record says.

    Raises:
        UserError: the record is damaged.
    """
    return load_record(dataset, Column, column_record(stage, shard, mark))


def read_members(
    dataset: Dataset, column: Column, keys: Sequence[str], names: Sequence[str]
) -> Iterator[dict[str, bytes]]:
    """Stored bytes of the fields `names` of each clip in `keys`, in order.

    Raises:
        UserError: the column is missing or shorter than its record says.
    """
    done = 0
    while done < len(keys):
        total, stop = 0, done
        while stop < len(keys) and (stop == done or total < READ_AHEAD):
            total += sum(column.clips[keys[stop]].members[name][1] for name in names)
            stop += 1
        places = [column.clips[key].members[name] for key in keys[done:stop] for name in names]
        try:
            data = iter(dataset.store.read_ranges(column.tar, places))
        except FileNotFoundError:
            raise UserError(f"{dataset.uri}/{column.tar}: gone since the build began; build again") from None
        for _ in keys[done:stop]:
            yield {name: next(data) for name in names}
        done = stop

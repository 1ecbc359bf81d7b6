"""The dataset folder: manifest, clip table, quarantine table and the index of packed shards, each typed.

`dataset.json` is written last and names everything that is current; readers start there.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from shards.config import Config
from shards.errors import UserError
from shards.schema import SCHEMA_VERSION
from shards.storage import Store

MANIFEST = "dataset.json"
CLIPS = "clips.parquet"
QUARANTINE = "quarantine.parquet"
INDEX = "train/index.json"


class Manifest(Config):
    """`dataset.json`.

    Attributes:
        columns: stage -> shard -> fingerprint of the column object that is current.
        weights: stage -> digest of the network files that it ran.
        codebook: object name of the k-means centroids, with the fingerprint of their fit.
        config: the build configuration, for the record and for finding out what changed.
    """

    schema_version: int
    profile: str
    splits: list[str]
    columns: dict[str, dict[str, str]]
    weights: dict[str, str]
    codebook: dict[str, str] | None = None
    config: dict[str, Any]


class PackedClip(Config):
    """A clip inside a packed shard; `members` maps field name to (byte offset, size)."""

    key: str
    frames: int
    members: dict[str, tuple[int, int]]


class PackedShard(Config):
    """A packed shard; `inputs` is the hash of all that it was packed from."""

    name: str
    shard: str
    split: str
    sha256: str
    bytes: int
    inputs: str
    clips: list[PackedClip]


class Index(Config):
    """`train/index.json`: all that a trainer needs to read the packed shards at random."""

    schema_version: int
    profile: str
    fields: list[str]
    widths: dict[str, int]
    weights: dict[str, str]
    config: dict[str, Any]
    shards: list[PackedShard]


@dataclass(frozen=True)
class ClipRow:
    """A row of `clips.parquet`; `state` is `packed` or `quarantined`, `frames` 0 for the latter."""

    key: str
    uri: str
    digest: str
    split: str
    speaker: str
    text: str
    start: float | None
    end: float | None
    frames: int
    shard: str
    state: str


@dataclass(frozen=True)
class QuarantineRow:
    """A row of `quarantine.parquet`: where and why a clip was refused; `retriable` marks faults of machine or code."""

    key: str
    uri: str
    split: str
    shard: str
    stage: str
    reason: str
    message: str
    traceback: str
    retriable: bool


Row = TypeVar("Row", ClipRow, QuarantineRow)
M = TypeVar("M", bound=Config)

_ARROW = {
    "str": pa.string(),
    "float | None": pa.float64(),
    "int": pa.int64(),
    "bool": pa.bool_(),
}


class Dataset:
    """A dataset at a URI. Nothing is cached: every read sees the current objects."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.store = Store(uri)

    def exists(self) -> bool:
        return self.store.exists(MANIFEST)

    def manifest(self) -> Manifest:
        """Raises UserError: no dataset here, or one of another schema version."""
        return self._load(Manifest, MANIFEST)

    def index(self) -> Index:
        """Raises UserError: no index, or one of another schema version."""
        return self._load(Index, INDEX)

    def write(self, name: str, record: Config) -> None:
        self.store.write(name, record.model_dump_json(indent=None).encode())

    def clips(self) -> list[ClipRow]:
        return self._rows(ClipRow, CLIPS)

    def quarantine(self) -> list[QuarantineRow]:
        return self._rows(QuarantineRow, QUARANTINE)

    def write_rows(self, name: str, kind: type[Row], rows: Sequence[Row]) -> None:
        """Write a table; column types come from the row class, so an empty table has them too."""
        schema = pa.schema([(field.name, _ARROW[str(field.type)]) for field in fields(kind)])
        table = pa.Table.from_pylist([asdict(row) for row in rows], schema)
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        self.store.write(name, buffer.getvalue())

    def _rows(self, kind: type[Row], name: str) -> list[Row]:
        try:
            table = pq.read_table(io.BytesIO(self.store.read(name)))
            return [kind(**row) for row in table.to_pylist()]
        except FileNotFoundError:
            raise UserError(f"{self.uri}: {name} is missing") from None
        except (pa.ArrowInvalid, TypeError) as error:
            raise UserError(f"{self.uri}/{name}: not a table of this schema ({error})") from None

    def _load(self, kind: type[M], name: str) -> M:
        try:
            tree = json.loads(self.store.read(name))
        except FileNotFoundError:
            raise UserError(f"{self.uri}: no dataset here ({name} is missing); make one with `f2v build`") from None
        except (NotADirectoryError, IsADirectoryError, PermissionError) as error:
            raise UserError(f"{self.uri}: cannot be read ({error.strerror})") from None
        except ValueError as error:
            raise UserError(f"{self.uri}/{name}: damaged, not JSON ({error})") from None
        version = tree.get("schema_version") if isinstance(tree, dict) else None
        if version != SCHEMA_VERSION:
            raise UserError(
                f"{self.uri}: {name} has schema version {version!r}, this program reads {SCHEMA_VERSION}; "
                "build into a new folder"
            )
        try:
            return kind.model_validate(tree)
        except ValidationError as error:
            raise UserError(f"{self.uri}/{name}: damaged ({error.error_count()} wrong entries)") from None

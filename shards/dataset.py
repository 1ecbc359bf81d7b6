"""The dataset at a URI: typed reading of its manifest and tables, and the one way to commit."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from shards.config import Config
from shards.errors import UserError
from shards.manifest import CLIPS, INDEX, MANIFEST, QUARANTINE, Index, Manifest, ObjectRef
from shards.schema import SCHEMA_VERSION
from shards.storage import open_store


@dataclass(frozen=True)
class ClipRow:
    """A row of the clip table.

    Attributes:
        bytes, stamp: of the media when `digest` was taken; equal ones are not read again.
        frames: F of a packed clip, else 0.
        state: `packed`, `quarantined`, or `pending` where its shard is not built yet.
    """

    key: str
    uri: str
    bytes: int
    stamp: str
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
    """A row of the quarantine table: where and why a clip was refused.

    Attributes:
        attempt: which attempt of that stage refused it.
        retriable: a fault of machine or code, so trying again may help.
    """

    key: str
    uri: str
    split: str
    shard: str
    stage: str
    reason: str
    message: str
    traceback: str
    attempt: int
    retriable: bool


Row = TypeVar("Row", ClipRow, QuarantineRow)
M = TypeVar("M", bound=Config)

_ARROW = {
    "str": pa.string(),
    "float | None": pa.float64(),
    "int": pa.int64(),
    "bool": pa.bool_(),
}
_TABLES: dict[type, str] = {ClipRow: "clips", QuarantineRow: "quarantine"}


class Dataset:
    """A dataset at a URI. Nothing is cached; whoever needs one state of several tables reads the manifest once and
    hands it on."""

    def __init__(self, uri: str) -> None:
        self.store = open_store(uri)
        self.uri = uri

    def exists(self) -> bool:
        return self.store.exists(MANIFEST)

    def current(self) -> tuple[Manifest | None, Any]:
        """The manifest and its version for `commit`; None before the first one."""
        found = self.store.read_version(MANIFEST)
        return (None, None) if found is None else (self._parse(Manifest, MANIFEST, found[0]), found[1])

    def manifest(self) -> Manifest:
        """Raises UserError: no dataset here, or one of another schema version."""
        return self._parse(Manifest, MANIFEST, self._read(MANIFEST))

    def index(self, manifest: Manifest | None = None) -> Index:
        """Raises UserError: no dataset, or the index is missing or damaged."""
        name = (manifest or self.manifest()).index.name
        return self._parse(Index, name, self._read(name))

    def clips(self, manifest: Manifest | None = None) -> list[ClipRow]:
        return self._rows(ClipRow, (manifest or self.manifest()).clips.name)

    def quarantine(self, manifest: Manifest | None = None) -> list[QuarantineRow]:
        return self._rows(QuarantineRow, (manifest or self.manifest()).quarantine.name)

    def put_rows(self, kind: type[Row], rows: Sequence[Row]) -> ObjectRef:
        """Store a table under its digest; column types come from the row class, so an empty table has them too."""
        schema = pa.schema([(field.name, _ARROW[str(field.type)]) for field in fields(kind)])
        columns = {field.name: [getattr(row, field.name) for row in rows] for field in fields(kind)}
        buffer = io.BytesIO()
        pq.write_table(pa.table(columns, schema), buffer)
        return self._put(f"tables/{_TABLES[kind]}-{{}}.parquet", buffer.getvalue())

    def put_index(self, index: Index) -> ObjectRef:
        """Store an index under its digest."""
        return self._put("train/index-{}.json", index.model_dump_json().encode())

    def commit(self, manifest: Manifest, version: Any) -> None:
        """Make `manifest` the current one, if the one before still has `version`.

        A copy under `manifests/` is left for `gc`, which keeps what recent manifests named.

        Raises:
            Conflict: somebody else committed since.
        """
        data = manifest.model_dump_json().encode()
        self.store.write(f"manifests/{hashlib.sha256(data).hexdigest()[:12]}.json", data)
        self.store.swap(MANIFEST, data, version)

    def refresh_copies(self, manifest: Manifest) -> None:
        """Bring the copies of the tables under their plain names up to date."""
        for name, ref in ((CLIPS, manifest.clips), (QUARANTINE, manifest.quarantine), (INDEX, manifest.index)):
            found = self.store.find(name)
            if not found or found.size != ref.bytes or self.store.sha256(name) != ref.sha256:
                self.store.write(name, self._read(ref.name))

    def _put(self, pattern: str, data: bytes) -> ObjectRef:
        digest = hashlib.sha256(data).hexdigest()
        name = pattern.format(digest[:12])
        found = self.store.find(name)
        if found is None or found.size != len(data):
            self.store.write(name, data)
        return ObjectRef(name=name, sha256=digest, bytes=len(data))

    def _read(self, name: str) -> bytes:
        try:
            return self.store.read(name)
        except FileNotFoundError:
            if name == MANIFEST:
                raise UserError(f"{self.uri}: no dataset here ({name} is missing); make one with `f2v build`") from None
            raise UserError(f"{self.uri}: {name} is missing; run `f2v verify`") from None
        except (NotADirectoryError, IsADirectoryError, PermissionError) as error:
            raise UserError(f"{self.uri}: cannot be read ({error.strerror})") from None

    def _rows(self, kind: type[Row], name: str) -> list[Row]:
        try:
            columns = pq.read_table(io.BytesIO(self._read(name))).to_pydict()
            names = [field.name for field in fields(kind)]
            if set(columns) != set(names):
                raise TypeError(f"columns {sorted(columns)}")
            return [kind(*values) for values in zip(*(columns[name] for name in names), strict=True)]
        except (pa.ArrowInvalid, TypeError) as error:
            raise UserError(f"{self.uri}/{name}: not a table of this schema ({error})") from None

    def _parse(self, kind: type[M], name: str, data: bytes) -> M:
        try:
            tree = json.loads(data)
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

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
from shards.manifest import CLIPS, HISTORY, INDEX, MANIFEST, QUARANTINE, Index, Manifest, ObjectRef
from shards.schema import SCHEMA_VERSION
from shards.storage import Conflict, open_store


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
_COPY: dict[type, str] = {ClipRow: CLIPS, QuarantineRow: QUARANTINE, Index: INDEX}


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
        return self.index_named((manifest or self.manifest()).index.name)

    def index_named(self, name: str) -> Index:
        """An index by the name of its object, current or not. Raises UserError: missing or damaged."""
        return self._parse(Index, name, self._read(name, INDEX))

    def index_and_clips(self, name: str) -> tuple[Index, list[Any]]:
        """An index without its clips, and the clips of each shard as they stand there, not validated: a model of each
        clip of a large dataset takes too long. Raises UserError: missing or damaged."""
        tree = self._tree(name, self._read(name, INDEX), _mend(INDEX))
        shards = tree.get("shards")
        if not isinstance(shards, list) or not all(isinstance(shard, dict) for shard in shards):
            raise UserError(f"{self.uri}/{name}: damaged, no list of shards; {_mend(INDEX)}")
        clips = [shard.pop("clips", None) for shard in shards]
        bare = {**tree, "shards": [{**shard, "clips": []} for shard in shards]}
        return self._validate(Index, name, bare), clips

    def replaced(self, name: str) -> Manifest | None:
        """The copy `name` of a manifest that was replaced; None where it is gone. Raises UserError: it is damaged."""
        try:
            return self._parse(Manifest, name, self.store.read(name))
        except FileNotFoundError:
            return None

    def clips(self, manifest: Manifest | None = None) -> list[ClipRow]:
        return self.clips_named((manifest or self.manifest()).clips.name)

    def clips_named(self, name: str) -> list[ClipRow]:
        """A clip table by the name of its object, current or not. Raises UserError: missing or damaged."""
        return self._rows(ClipRow, name)

    def quarantine(self, manifest: Manifest | None = None) -> list[QuarantineRow]:
        return self._rows(QuarantineRow, (manifest or self.manifest()).quarantine.name)

    def put_rows(self, kind: type[Row], rows: Sequence[Row]) -> ObjectRef:
        """Store a table under its digest; column types come from the row class, so an empty table has them too."""
        columns = {field.name: [getattr(row, field.name) for row in rows] for field in fields(kind)}
        buffer = io.BytesIO()
        pq.write_table(pa.table(columns, _schema(kind)), buffer)
        return self._put(f"tables/{_TABLES[kind]}-{{}}.parquet", buffer.getvalue())

    def put_index(self, index: Index) -> ObjectRef:
        """Store an index under its digest."""
        return self._put("train/index-{}.json", index.model_dump_json().encode())

    def commit(self, manifest: Manifest, version: Any) -> None:
        """Make `manifest` the current one, if the one before still has `version`.

        The one before is first copied to `manifests/`: by the time of that copy `gc` knows when it was replaced, and
        keeps what its readers need.

        Raises:
            Conflict: somebody else committed since, or `gc` deleted an old object that was to be taken up again.
        """
        before = self.store.read_version(MANIFEST)
        if before is not None:
            data, found = before
            if found != version:
                raise Conflict(f"{self.uri}/{MANIFEST}")
            gone = set(manifest.objects()) - set(self._parse(Manifest, MANIFEST, data).objects())
            if gone:
                gone -= {there.name for there in self.store.list()}
            if gone:
                raise Conflict(f"{self.uri}/{min(gone)} is gone")
            self.store.write(f"{HISTORY}{hashlib.sha256(data).hexdigest()[:12]}.json", data)
        self.store.swap(MANIFEST, manifest.model_dump_json().encode(), version)

    def refresh_copies(self, manifest: Manifest) -> None:
        """Bring the copies of the tables under their plain names up to date with `manifest`, or with what was committed
        after it."""
        while True:
            for name, ref in ((CLIPS, manifest.clips), (QUARANTINE, manifest.quarantine), (INDEX, manifest.index)):
                if not self._holds(name, ref):
                    self.store.write(name, self._read(ref.name, name))
            # Another build may have committed and copied meanwhile; whoever writes last has looked again after that.
            current = self.manifest()
            if current == manifest:
                return
            manifest = current

    def _holds(self, name: str, ref: ObjectRef) -> bool:
        found = self.store.find(name)
        return found is not None and found.size == ref.bytes and self.store.sha256(name) == ref.sha256

    def _put(self, pattern: str, data: bytes) -> ObjectRef:
        digest = hashlib.sha256(data).hexdigest()
        ref = ObjectRef(name=pattern.format(digest[:12]), sha256=digest, bytes=len(data))
        if not self._holds(ref.name, ref):
            self.store.write(ref.name, data)
        return ref

    def _read(self, name: str, copy: str = "") -> bytes:
        """The object `name`, of which `copy` is the copy for people."""
        try:
            return self.store.read(name)
        except FileNotFoundError:
            if name == MANIFEST:
                raise UserError(f"{self.uri}: no dataset here ({name} is missing); make one with `f2v build`") from None
            raise UserError(f"{self.uri}: {name} is missing; {_mend(copy)}") from None
        except (NotADirectoryError, IsADirectoryError, PermissionError) as error:
            raise UserError(f"{self.uri}: cannot be read ({error.strerror})") from None

    def _rows(self, kind: type[Row], name: str) -> list[Row]:
        data = self._read(name, _COPY[kind])
        try:
            # Without any thread of pyarrow's: once its pools have started, some processes abort when they exit.
            table = pq.ParquetFile(io.BytesIO(data), pre_buffer=False).read(use_threads=False)
            if not table.schema.equals(_schema(kind)):
                raise TypeError(f"columns {', '.join(f'{field.name} {field.type}' for field in table.schema)}")
            return [kind(*values) for values in zip(*table.to_pydict().values(), strict=True)]
        except (pa.ArrowException, OSError, ValueError, TypeError) as error:
            words = " ".join(str(error).split())
            raise UserError(
                f"{self.uri}/{name}: damaged, no table of this schema ({words}); {_mend(_COPY[kind])}"
            ) from None

    def _parse(self, kind: type[M], name: str, data: bytes) -> M:
        return self._validate(kind, name, self._tree(name, data, _mend(_COPY[kind]) if kind in _COPY else ""))

    def _tree(self, name: str, data: bytes, mend: str) -> dict[str, Any]:
        try:
            tree = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.uri}/{name}: damaged, not JSON ({error}){mend and f'; {mend}'}") from None
        version = tree.get("schema_version") if isinstance(tree, dict) else None
        if version != SCHEMA_VERSION:
            raise UserError(
                f"{self.uri}: {name} has schema version {version!r}, this program reads {SCHEMA_VERSION}; "
                "build into a new folder"
            )
        return dict(tree)

    def _validate(self, kind: type[M], name: str, tree: dict[str, Any]) -> M:
        try:
            return kind.model_validate(tree)
        except ValidationError as error:
            mend = f"; {_mend(_COPY[kind])}" if kind in _COPY else ""
            raise UserError(f"{self.uri}/{name}: damaged ({error.error_count()} wrong entries){mend}") from None


def _schema(kind: type) -> pa.Schema:
    return pa.schema([(field.name, _ARROW[str(field.type)]) for field in fields(kind)])


def _mend(copy: str) -> str:
    return f"put its copy {copy} in its place"

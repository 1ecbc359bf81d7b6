"""Buckets (`s3://`, `gs://`) through obstore, which takes up a cut or stalled transfer where it broke off.

Processes that are forked must not use a client of their parent: its threads do not survive the fork (forkserver and
spawn are fine).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import wait
from typing import IO, Any

import obstore
from obstore import exceptions

from shards.errors import UserError
from shards.object_client import client, describe, event_loop
from shards.remote import PART, RETRY_FOR, TIMEOUT, EndsEarly, RemoteStore, Stopped, never, read_joined
from shards.storage import Conflict, Object, StorageError, check_name

SINGLE_PUT = PART
"""Larger objects are sent in parts, which are retried one by one."""
UPLOAD_PART = 8 << 20
UPLOADS = 4
"""Parts on their way at once: with `TIMEOUT`, a line of 1 MB/s is fast enough."""
MAX_FAULTS = 5
MARK = "swap"
TICK = 0.1


class ObjectStore(RemoteStore):
    """A prefix in a bucket."""

    def __init__(self, uri: str) -> None:
        match = re.fullmatch(r"(s3|gs)://([A-Za-z0-9][A-Za-z0-9._-]*)(?:/([^?#]*))?", uri)
        if not match:
            raise UserError(f"{uri.partition('://')[0]}://...: expected s3://bucket/prefix (no credentials, no query)")
        self.uri = uri.rstrip("/")
        self._prefix = (match[3] or "").strip("/")
        if self._prefix:
            _check_key(self._prefix, self.uri)
        self._client = client(match[1], match[2], TIMEOUT, RETRY_FOR)

    def read(self, name: str) -> bytes:
        with self._errors(name):
            result = obstore.get(self._client, self._key(name))
            size = result.meta["size"]
            data = bytes(result.bytes())
        return self._whole(name, data, size)

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        def fetch(spans: list[tuple[int, int]]) -> Sequence[Any]:
            # obstore could join ranges itself, but panics if the object ends before one that it joined.
            starts, ends = [start for start, _ in spans], [end for _, end in spans]
            with self._errors(name):
                return obstore.get_ranges(self._client, self._key(name), starts=starts, ends=ends, coalesce=0)

        parts = zip(ranges, read_joined(ranges, fetch), strict=True)
        return [self._whole(name, bytes(part), size) for (_, size), part in parts]

    def read_some(self, name: str, offset: int, size: int, stopped: Callable[[], bool] = never) -> Any:
        # A thread inside obstore could be neither stopped nor left behind at the end of the process (its return to
        # an interpreter that is gone aborts); a task can be cancelled.
        async def get() -> Any:
            return await obstore.get_range_async(self._client, key, start=offset, end=offset + size)

        key = self._key(name)
        with self._errors(name):
            task = asyncio.run_coroutine_threadsafe(get(), event_loop())
            while not wait([task], timeout=TICK).done:
                if stopped():
                    task.cancel()
                    raise Stopped
            return task.result()

    def find(self, name: str) -> Object | None:
        try:
            with self._errors(name):
                return self._object(obstore.head(self._client, self._key(name)))
        except FileNotFoundError:
            return None

    def list(self, prefix: str = "") -> Iterator[Object]:
        # Buckets list by whole folders; the last part of the prefix is matched here.
        folder = "/".join(filter(None, [self._prefix, prefix.rpartition("/")[0]]))
        key, faults = None, 0
        while True:
            try:
                with self._errors(prefix):
                    for batch in obstore.list(self._client, prefix=f"{folder}/" if folder else None, offset=key):
                        for meta in batch:
                            key, faults = meta["path"], 0
                            found = self._object(meta)
                            if found.name.startswith(prefix):
                                yield found
                return
            except StorageError as error:
                # obstore takes up every other broken answer by itself.
                faults += 1
                if "list response body" not in str(error) or faults > MAX_FAULTS:
                    raise

    def delete(self, names: Iterable[str]) -> None:
        keys = [self._key(name) for name in names]
        with self._errors(""), contextlib.suppress(FileNotFoundError):
            if keys:
                obstore.delete(self._client, keys)

    @contextlib.contextmanager
    def draft(self) -> Iterator[ObjectDraft]:
        # On disk first: nothing reaches the bucket before all of it is there, whatever happens to the writer.
        with tempfile.TemporaryFile() as stream:
            yield ObjectDraft(self, stream)

    def put(self, name: str, stream: IO[bytes]) -> None:
        """Send all of a file."""
        size = stream.seek(0, os.SEEK_END)
        stream.seek(0)
        with self._errors(name):
            obstore.put(
                self._client,
                self._key(name),
                stream,
                use_multipart=size > SINGLE_PUT,
                chunk_size=UPLOAD_PART,
                max_concurrency=UPLOADS,
            )

    def read_version(self, name: str) -> tuple[bytes, Any] | None:
        try:
            with self._errors(name):
                result = obstore.get(self._client, self._key(name))
                meta = result.meta
                data = bytes(result.bytes())
        except FileNotFoundError:
            return None
        version = {key: meta[key] for key in ("e_tag", "version") if meta.get(key)}
        return self._whole(name, data, meta["size"]), version

    def swap(self, name: str, data: bytes, version: Any | None) -> None:
        # The answer to a request that did arrive may be lost, and its repetition then meets itself: the mark tells an
        # object of this call from one that somebody else wrote, even with the same bytes.
        mark = secrets.token_hex(16)
        mode: Any = "create" if version is None else version
        for faults in range(1, MAX_FAULTS + 1):
            try:
                with self._errors(name):
                    obstore.put(
                        self._client, self._key(name), data, mode=mode, use_multipart=False, attributes={MARK: mark}
                    )
                return
            except FileNotFoundError:
                raise Conflict(f"{self.uri}/{name}") from None
            except (Conflict, StorageError) as error:
                if self._marked(name, mark):
                    return
                # obstore leaves a conditional request that timed out; its condition makes repeating it safe.
                if isinstance(error, Conflict) or faults == MAX_FAULTS:
                    raise

    def _marked(self, name: str, mark: str) -> bool:
        try:
            with self._errors(name):
                return obstore.get(self._client, self._key(name)).attributes.get(MARK) == mark
        except FileNotFoundError:
            return False

    def __reduce__(self) -> tuple[Any, ...]:
        # A client stays in its process; the copy in another one makes its own.
        return ObjectStore, (self.uri,)

    def _key(self, name: str) -> str:
        return "/".join(filter(None, [self._prefix, _check_key(name, self.uri)]))

    def _object(self, meta: Any) -> Object:
        name = meta["path"][len(self._prefix) + 1 :] if self._prefix else meta["path"]
        return Object(name, meta["size"], meta["last_modified"], (meta.get("e_tag") or "").strip('"'))

    def _whole(self, name: str, data: bytes, size: int) -> bytes:
        if len(data) != size:
            raise StorageError(f"{self.uri}/{name}: cut, {len(data)} bytes came of {size}")
        return data

    @contextlib.contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        where = f"{self.uri}/{name}".rstrip("/")
        try:
            yield
        except FileNotFoundError:
            if name and not self._bucket_exists():
                raise StorageError(f"{where}: no such bucket; make it or correct the URI") from None
            raise FileNotFoundError(where) from None
        except (exceptions.PreconditionError, exceptions.AlreadyExistsError):
            raise Conflict(where) from None
        except exceptions.BaseError as error:
            kind = EndsEarly if "416 Range Not Satisfiable" in str(error) else StorageError
            raise kind(f"{where}: {describe(error)}") from None

    def _bucket_exists(self) -> bool:
        # A missing object and a missing bucket give the same exception; only a listing tells them apart.
        try:
            next(iter(obstore.list(self._client, chunk_size=1)), None)
        except exceptions.BaseError as error:
            return "NoSuchBucket" not in str(error)
        return True


class ObjectDraft:
    """A nameless local file that is sent when it is published."""

    def __init__(self, target: ObjectStore, stream: IO[bytes]) -> None:
        self._target, self.stream = target, stream

    def publish(self, name: str) -> None:
        self._target.put(name, self.stream)


def _check_key(key: str, uri: str) -> str:
    """`key`, if it can name an object. Raises UserError."""
    if re.search(r"[\x01-\x1f\x7f]", key):
        raise UserError(f"{key!r}: control characters in an object name in {uri!r}")
    return check_name(key, uri)

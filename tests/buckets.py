"""Tools of the tests that use a bucket: a proxy in between, and what a user may be shown."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from shards.errors import UserError
from shards.storage import Store
from tests.proxy import FaultProxy
from tests.seaweed import BUCKET, FULL, READ_ONLY, S3Server

BIG = random.Random(1).randbytes(20 << 20)
NAMES = ["plain", "a b.txt", "ü/ñ.mp4", "50%.txt", "a%20b", "x+y", "h#1", "q?1", "e=1&f", "k'q", "日本.wav", "<é>"]


@pytest.fixture
def proxy(
    s3_server: S3Server,
    s3_uri: str,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[FaultProxy]:
    """A proxy that all requests of this process take."""
    with FaultProxy(int(s3_server.endpoint.rpartition(":")[2])) as proxy:
        setenv(monkeypatch, AWS_ENDPOINT_URL=proxy.endpoint)
        yield proxy


def setenv(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    """Change the environment, and forget the clients that were made from the old one."""
    from shards import object_store

    for name, value in values.items():
        monkeypatch.setenv(name, value)
    object_store.client.cache_clear()


def patience(monkeypatch: pytest.MonkeyPatch, **values: Any) -> None:
    """Change constants of the object store."""
    from shards import object_store

    for name, value in values.items():
        monkeypatch.setattr(object_store, name, value)
    object_store.client.cache_clear()


class Outside:
    """What lies in a prefix, seen by boto3 and without the proxy."""

    def __init__(self, server: S3Server, uri: str) -> None:
        self.client = server.client()
        self.prefix = uri.removeprefix(f"s3://{BUCKET}/") + "/"

    def names(self) -> list[str]:
        found = self.client.list_objects_v2(Bucket=BUCKET, Prefix=self.prefix).get("Contents", [])
        return sorted(entry["Key"].removeprefix(self.prefix) for entry in found)

    def read(self, name: str) -> bytes:
        return self.client.get_object(Bucket=BUCKET, Key=self.prefix + name)["Body"].read()

    def write(self, name: str, data: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=self.prefix + name, Body=data)

    def pending(self) -> list[str]:
        found = self.client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])
        return [entry["Key"] for entry in found if entry["Key"].startswith(self.prefix)]


@pytest.fixture
def outside(s3_server: S3Server, s3_uri: str) -> Outside:
    return Outside(s3_server, s3_uri)


def names(store: Store, prefix: str = "") -> list[str]:
    return sorted(found.name for found in store.list(prefix))


def one_line(error: BaseException, *parts: str) -> None:
    """What a user may be shown: one line that says what happened, and no part of any credential."""
    text = str(error)
    assert isinstance(error, UserError)
    assert "\n" not in text
    assert len(text) < 400
    assert all(part in text for part in parts), text
    assert not [secret for secret in (*FULL, *READ_ONLY, "WRONG") if secret in text]

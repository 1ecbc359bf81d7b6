"""The training stream from a bucket and a web server: the same bits as from disk, through faults of the network."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path
from typing import Any

import pytest

from shards.dataset import Dataset
from shards.errors import UserError
from shards.layout import NEEDED
from shards.stream import StreamConfig, TrainingStream
from tests.buckets import Outside
from tests.proxy import FaultProxy
from tests.streams import same
from tests.test_fetch import settle
from tests.test_stream_processes import workers_of
from tests.toy import toy_dataset
from tests.webserver import serve

SHARDS = [[60, 50], [45, 80], [60, 90], [55, 65], [70, 41], [62, 53], [48, 57]]


def take(uri: str, cache: Path, start: int, count: int, **settings: object) -> tuple[list[dict[str, Any]], Any]:
    plain = {"batch": 2, "crop_frames": 20, "workers": 1, "window": 2, "cache": str(cache), **settings}
    with TrainingStream(uri, StreamConfig.model_validate(plain), seed=3) as source:
        return list(itertools.islice(source.batches(start), count)), source.fetched


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("local")
    toy_dataset(folder, SHARDS, raw=True, fields=NEEDED)
    return folder, take(str(folder), folder / "cache", 0, 20)[0]


def upload(outside: Outside, folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            outside.write(path.relative_to(folder).as_posix(), path.read_bytes())


def test_a_bucket_through_cuts_stalls_and_wrong_bytes(
    s3_uri: str,
    outside: Outside,
    proxy: FaultProxy,
    local: tuple[Path, list[dict[str, Any]]],
    tmp_path: Path,
) -> None:
    folder, whole = local
    upload(outside, folder)
    sizes = [shard.bytes for shard in Dataset(str(folder)).index().shards]
    proxy.cut(after=min(sizes) // 2, times=3)
    proxy.unavailable(times=2)
    proxy.corrupt(at=min(sizes) // 3, times=1)
    found, stats = take(s3_uri, tmp_path / "cache", 0, 20, cache_bytes=sum(sizes) // 2)
    assert all(same(a, b) for a, b in zip(whole, found, strict=True))
    assert proxy.counts["cut"] == 3
    assert proxy.counts["corrupt"] == 1
    assert stats.refetched == 1
    held = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.tar"))
    assert 0 < held <= sum(sizes) // 2
    # A run that comes back finds what is still there.
    take(s3_uri, tmp_path / "large", 0, 20)
    again, stats = take(s3_uri, tmp_path / "large", 16, 4)
    assert all(same(a, b) for a, b in zip(whole[16:], again, strict=True))
    assert stats.hits > 0
    assert stats.fetched_bytes == 0


def test_what_comes_next_is_fetched_ahead(
    s3_uri: str, outside: Outside, local: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    upload(outside, local[0])
    config = StreamConfig(batch=1, crop_frames=20, workers=0, window=2, ahead=2, cache=tmp_path / "cache")
    with TrainingStream(s3_uri, config, seed=3) as source:
        next(source.batches(0))
        settle(lambda: len(list((tmp_path / "cache").glob("*.tar"))) == 3)
        time.sleep(0.2)
        assert len(list((tmp_path / "cache").glob("*.tar"))) == 3


def test_a_shard_that_gave_way_takes_no_room(
    s3_uri: str, outside: Outside, local: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    upload(outside, local[0])
    largest = max(shard.bytes for shard in Dataset(str(local[0])).index().shards)
    config = StreamConfig(
        batch=1, crop_frames=20, workers=1, window=1, prefetch=1, cache=tmp_path / "cache", cache_bytes=2 * largest
    )
    with TrainingStream(s3_uri, config, seed=3) as source:
        for _ in itertools.islice(source.batches(0), 30):
            [worker] = workers_of(os.getpid())
            links = [os.readlink(path) for path in Path(f"/proc/{worker}/fd").iterdir() if path.is_symlink()]
            assert sum(".tar (deleted)" in link for link in links) <= 2


def test_a_shard_that_is_damaged_in_the_bucket(
    s3_uri: str, outside: Outside, local: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    folder, _ = local
    upload(outside, folder)
    name = Dataset(str(folder)).index().shards[1].name
    data = bytearray((folder / name).read_bytes())
    data[-2000] ^= 1
    outside.write(name, bytes(data))
    with pytest.raises(UserError, match=rf"{name}: corrupt: its sha256"):
        take(s3_uri, tmp_path / "cache", 0, 20)
    found, _ = take(s3_uri, tmp_path / "cache", 0, 20, damaged="skip")
    assert not any(key.startswith("s1") for batch in found for key in batch["keys"])


def test_a_cache_that_is_too_small_says_what_it_needs(
    s3_uri: str, outside: Outside, local: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    upload(outside, local[0])
    with pytest.raises(UserError, match=r"data\.cache_bytes is 1000000: raise it") as caught:
        take(s3_uri, tmp_path / "cache", 0, 1, cache_bytes=1_000_000)
    # What it says is enough for all steps, those where an epoch ends included.
    enough = int(str(caught.value).rpartition("; ")[2].split()[0])
    found, _ = take(s3_uri, tmp_path / "cache", 0, 20, cache_bytes=enough)
    assert all(same(a, b) for a, b in zip(local[1], found, strict=True))


def test_a_web_server(local: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    folder, whole = local
    with serve() as server:
        for path in folder.rglob("*"):
            if path.is_file():
                server.files[f"/{path.relative_to(folder).as_posix()}"] = path.read_bytes()
        found, stats = take(server.uri, tmp_path / "cache", 0, 20, workers=0)
    assert all(same(a, b) for a, b in zip(whole, found, strict=True))
    assert stats.fetched_bytes > 0

"""Buckets: transfers that break on the way, and what only a bucket can get wrong."""

from __future__ import annotations

import hashlib
import secrets
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from shards.errors import UserError
from shards.storage import (
    StorageError,
    open_store,
)
from tests.buckets import BIG, NAMES, Outside, names, one_line, patience
from tests.proxy import FaultProxy
from tests.seaweed import BUCKET, S3Server


class TestTransfers:
    """Faults on the line. Each test asserts that its fault did happen."""

    @pytest.mark.parametrize("times", [1, 3])
    def test_a_cut_read_is_resumed(self, proxy: FaultProxy, outside: Outside, s3_uri: str, times: int) -> None:
        outside.write("a", BIG)
        proxy.cut(after=5 << 20, times=times)
        assert open_store(s3_uri).read("a") == BIG
        assert proxy.counts["cut"] == times
        # Taken up where it broke off, not begun anew.
        assert proxy.asked[1] == ("GET", f"bytes={5 << 20}-{len(BIG) - 1}")

    def test_cut_streams_and_ranges_are_resumed(self, proxy: FaultProxy, outside: Outside, s3_uri: str) -> None:
        outside.write("a", BIG)
        store = open_store(s3_uri)
        proxy.cut(after=3 << 20, times=2)
        assert store.sha256("a") == hashlib.sha256(BIG).hexdigest()
        proxy.cut(after=1 << 20, times=3)
        assert store.read_ranges("a", [(7, 4 << 20), (9 << 20, 5)]) == [BIG[7 : 7 + (4 << 20)], BIG[9 << 20 :][:5]]
        assert proxy.counts["cut"] == 5

    def test_a_stalled_read_is_resumed(
        self,
        proxy: FaultProxy,
        outside: Outside,
        s3_uri: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        patience(monkeypatch, TIMEOUT=timedelta(seconds=2))
        outside.write("a", BIG)
        proxy.stall(after=5 << 20, seconds=60)
        assert open_store(s3_uri).read("a") == BIG
        assert proxy.counts["stall"] == 1

    def test_a_read_that_breaks_for_ever_is_an_error(
        self,
        proxy: FaultProxy,
        outside: Outside,
        s3_uri: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        patience(monkeypatch, RETRY_FOR=timedelta(seconds=0.5))
        outside.write("a", BIG)
        proxy.cut(after=1000, times=10**6)
        with pytest.raises(StorageError) as caught:
            open_store(s3_uri).read("a")
        one_line(caught.value)

    def test_overload_is_waited_for(self, proxy: FaultProxy, s3_uri: str) -> None:
        store = open_store(s3_uri)
        for step in (
            lambda: store.write("a", b"1"),
            lambda: store.read("a"),
            lambda: names(store),
            lambda: store.swap("b", b"1", None),
            lambda: store.delete(["a"]),
        ):
            proxy.unavailable(times=2)
            step()
        assert names(store) == ["b"]
        assert proxy.counts["unavailable"] == 10

    def test_a_server_that_is_away_for_seconds(self, proxy: FaultProxy, s3_uri: str) -> None:
        proxy.unavailable(times=10**6)
        back = threading.Timer(3, proxy.mend)
        back.start()
        open_store(s3_uri).write("a", b"1")
        back.join()
        assert open_store(s3_uri).read("a") == b"1"
        assert proxy.counts["unavailable"] > 2

    def test_a_cut_listing_is_taken_up(self, proxy: FaultProxy, s3_uri: str) -> None:
        store = open_store(s3_uri)
        expected = [f"{i:04}" for i in range(1100)]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda name: store.write(name, b""), expected))
        found: list[str] = []
        for entry in store.list():
            if not found:
                # The server lists a thousand at a time; this cuts the second answer, and its repetition.
                proxy.cut(after=100, times=2)
            found.append(entry.name)
        assert found == expected
        assert proxy.counts["cut"] == 2
        store.delete(expected)
        assert names(store) == []

    @pytest.mark.parametrize("times", [1, 3])
    def test_a_swap_whose_answer_is_lost_succeeds(self, proxy: FaultProxy, s3_uri: str, times: int) -> None:
        store = open_store(s3_uri)
        proxy.swallow(times)
        store.swap("m", b"1", None)
        found = store.read_version("m")
        assert found is not None
        proxy.swallow(times)
        store.swap("m", b"2", found[1])
        assert store.read("m") == b"2"
        assert proxy.counts["swallow"] == 2 * times

    def test_a_stalled_swap_is_repeated(
        self,
        proxy: FaultProxy,
        s3_uri: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        patience(monkeypatch, TIMEOUT=timedelta(seconds=1))
        proxy.stall_upload(after=1, seconds=60)
        open_store(s3_uri).swap("m", b"12345", None)
        assert open_store(s3_uri).read("m") == b"12345"
        assert proxy.counts["stall_upload"] == 1

    @pytest.mark.parametrize("limit", [64 << 20, 8 << 20])
    def test_a_broken_upload_is_repeated(
        self,
        proxy: FaultProxy,
        outside: Outside,
        s3_uri: str,
        monkeypatch: pytest.MonkeyPatch,
        limit: int,
    ) -> None:
        patience(monkeypatch, SINGLE_PUT=limit, TIMEOUT=timedelta(seconds=3))
        store = open_store(s3_uri)
        for arm in (
            lambda: proxy.cut_upload(after=3 << 20, times=2),
            lambda: proxy.stall_upload(after=3 << 20, seconds=60),
            lambda: proxy.swallow(),
        ):
            arm()
            store.write("a", BIG)
            assert outside.read("a") == BIG
            outside.client.delete_object(Bucket=BUCKET, Key=outside.prefix + "a")
        assert (proxy.counts["cut_upload"], proxy.counts["stall_upload"], proxy.counts["swallow"]) == (2, 1, 1)
        assert (("POST", "") in proxy.asked) == (limit < len(BIG))

    @pytest.mark.parametrize("limit", [64 << 20, 8 << 20])
    def test_an_upload_that_fails_changes_nothing(
        self,
        proxy: FaultProxy,
        outside: Outside,
        s3_uri: str,
        monkeypatch: pytest.MonkeyPatch,
        limit: int,
    ) -> None:
        patience(monkeypatch, SINGLE_PUT=limit, RETRY_FOR=timedelta(seconds=0.5))
        outside.write("old", b"old")
        proxy.cut_upload(after=3 << 20, times=10**6)
        for name in ("old", "new"):
            with pytest.raises(StorageError) as caught:
                open_store(s3_uri).write(name, BIG)
            one_line(caught.value)
        assert outside.names() == ["old"]
        assert outside.read("old") == b"old"
        assert outside.pending() == []
        assert proxy.counts["cut_upload"] >= 2

    def test_a_finished_upload_whose_answer_is_lost_succeeds(
        self,
        proxy: FaultProxy,
        outside: Outside,
        s3_uri: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        patience(monkeypatch, SINGLE_PUT=8 << 20)
        proxy.swallow(request=r"POST .*uploadId=")
        open_store(s3_uri).write("a", BIG)
        assert outside.read("a") == BIG
        assert proxy.counts["swallow"] == 1


class TestBuckets:
    @pytest.mark.parametrize("name", NAMES)
    def test_other_tools_see_the_same_names(self, outside: Outside, s3_uri: str, name: str) -> None:
        store = open_store(s3_uri)
        store.write(name, b"ours")
        assert outside.names() == [name]
        assert outside.read(name) == b"ours"
        outside.write(name, b"theirs")
        assert store.read(name) == b"theirs"

    def test_ranges_that_lie_close_come_in_one_request(self, proxy: FaultProxy, outside: Outside, s3_uri: str) -> None:
        outside.write("a", BIG)
        near = [(1000 * i, 900) for i in range(50)]
        assert open_store(s3_uri).read_ranges("a", [*near, (9 << 20, 5)]) == [
            *(BIG[offset : offset + size] for offset, size in near),
            BIG[9 << 20 :][:5],
        ]
        assert sorted(proxy.asked) == [("GET", "bytes=0-49899"), ("GET", f"bytes={9 << 20}-{(9 << 20) + 4}")]

    def test_prefixes_do_not_mix(self, s3_uri: str) -> None:
        open_store(s3_uri).write("a", b"1")
        open_store(s3_uri + "-2").write("b", b"1")
        assert names(open_store(s3_uri)) == ["a"]
        assert names(open_store(s3_uri + "/")) == ["a"]

    def test_a_whole_bucket(self, s3_server: S3Server, s3_uri: str) -> None:
        bucket = f"whole-{secrets.token_hex(4)}"
        s3_server.make_bucket(bucket)
        store = open_store(f"s3://{bucket}")
        store.write("a/b", b"1")
        assert names(store) == ["a/b"]
        assert store.read("a/b") == b"1"

    def test_a_control_character_in_a_name(self, s3_uri: str) -> None:
        with pytest.raises(UserError, match="control character"):
            open_store(s3_uri).write("a\nb", b"")

"""Datasets on a web server: what arrives whole in spite of faults, and what is refused."""

from __future__ import annotations

import hashlib
import pickle
import random
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards import http_store, remote
from shards.errors import UserError
from shards.storage import StorageError, Store, is_readable, is_remote, open_store, open_uri
from tests.buckets import NAMES, one_line
from tests.proxy import FaultProxy
from tests.webserver import WebServer, serve

BIG = random.Random(2).randbytes(3 << 20)


@pytest.fixture
def web() -> Iterator[WebServer]:
    with serve() as server:
        server.files["/set/a"] = BIG
        yield server


@pytest.fixture
def proxy(web: WebServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    monkeypatch.setattr(http_store, "TIMEOUT", timedelta(seconds=0.3))
    monkeypatch.setattr(remote, "PAUSE", (0.01, 0.1))
    with FaultProxy(web.port) as proxy:
        yield proxy


@pytest.fixture
def store(proxy: FaultProxy) -> Store:
    return open_store(f"{proxy.endpoint}/set")


class TestReading:
    @pytest.mark.parametrize("name", NAMES)
    def test_names(self, web: WebServer, name: str) -> None:
        web.files[f"/my data/{name}"] = name.encode()
        for base in (f"{web.uri}/my data", f"{web.uri}/my%20data/"):
            assert open_store(base).read(name) == name.encode()
        assert is_remote(web.uri)

    def test_a_single_file_by_its_address(self, web: WebServer) -> None:
        web.files["/x/a b.wav"] = b"sound"
        for uri in (f"{web.uri}/x/a b.wav", f"{web.uri}/x/a%20b.wav"):
            store, name = open_uri(uri)
            assert (name, store.read(name)) == ("a b.wav", b"sound")
            assert is_readable(uri)
        assert not is_readable(f"{web.uri}/x/b.wav")

    def test_what_is_there(self, web: WebServer) -> None:
        store = open_store(f"{web.uri}/set")
        web.files["/set/empty"] = b""
        found = store.find("a")
        assert found is not None
        assert (found.size, found.modified) == (len(BIG), datetime(2015, 10, 21, 7, 28, tzinfo=timezone.utc))
        empty = store.find("empty")
        assert empty is not None
        assert empty.size == 0
        assert store.read("empty") == b""
        assert store.read_version("empty") == (b"", None)
        assert store.find("b") is None
        assert store.read_version("b") is None
        for call in (store.read, store.open, lambda name: store.read_ranges(name, [(0, 1)])):
            with pytest.raises(FileNotFoundError):
                call("b")

    def test_an_unknown_time_of_change_is_never_taken_for_the_same(self, web: WebServer) -> None:
        web.dates = False
        store = open_store(f"{web.uri}/set")
        stamps = {found.stamp for found in (store.find("a"), store.find("a")) if found}
        assert len(stamps) == 2

    @settings(max_examples=25, deadline=None)
    @given(data=st.data())
    def test_ranges(self, shared: WebServer, data: st.DataObject) -> None:
        offset = st.integers(0, len(BIG))
        ranges = data.draw(st.lists(offset.flatmap(lambda at: st.tuples(st.just(at), st.integers(0, len(BIG) - at)))))
        found = open_store(f"{shared.uri}/set").read_ranges("a", ranges)
        assert found == [BIG[at : at + size] for at, size in ranges]

    def test_a_range_past_the_end(self, web: WebServer) -> None:
        store = open_store(f"{web.uri}/set")
        for wanted in ((len(BIG) - 1, 2), (len(BIG) + 5, 2)):
            with pytest.raises(StorageError, match="ends before"):
                store.read_ranges("a", [wanted])

    def test_a_store_goes_to_other_processes(self, web: WebServer) -> None:
        assert pickle.loads(pickle.dumps(open_store(f"{web.uri}/set"))).read("a") == BIG


@pytest.fixture(scope="module")
def shared() -> Iterator[WebServer]:
    with serve() as server:
        server.files["/set/a"] = BIG
        yield server


class TestFaults:
    @pytest.mark.parametrize("tags", [True, False])
    @pytest.mark.parametrize("fault", ["cut", "cut at once", "stall", "stall at once", "overload", "no answer"])
    def test_a_broken_read_is_taken_up(
        self, web: WebServer, proxy: FaultProxy, store: Store, fault: str, tags: bool
    ) -> None:
        web.tags = tags
        arm = {
            "cut": lambda: proxy.cut(1 << 20, times=2),
            "cut at once": lambda: proxy.cut(0, times=2),
            "stall": lambda: proxy.stall(1 << 20, 60),
            "stall at once": lambda: proxy.stall(0, 60),
            "overload": lambda: proxy.unavailable(2),
            "no answer": lambda: proxy.swallow(2, "GET "),
        }[fault]
        arm()
        assert store.read("a") == BIG
        arm()
        assert store.read_ranges("a", [(5, 2 << 20), (3 << 20, 0)]) == [BIG[5 : 5 + (2 << 20)], b""]
        arm()
        with store.open("a") as stream:
            assert hashlib.sha256(stream.read()).digest() == hashlib.sha256(BIG).digest()
        kind = {"overload": "unavailable", "no answer": "swallow"}.get(fault, fault.split()[0])
        assert proxy.counts[kind] == (3 if kind == "stall" else 6)
        assert len(web.asked) < 20

    @pytest.mark.parametrize("fault", ["cut", "stall"])
    def test_bytes_that_came_are_not_fetched_again(self, proxy: FaultProxy, store: Store, fault: str) -> None:
        proxy.cut(2 << 20) if fault == "cut" else proxy.stall(2 << 20, 60)
        assert store.read_ranges("a", [(7, 3_000_000)]) == [BIG[7:3_000_007]]
        assert [asked for _, asked in proxy.asked] == ["bytes=7-3000006", f"bytes={7 + (2 << 20)}-3000006"]

    def test_a_server_that_drips_is_left(
        self, proxy: FaultProxy, store: Store, monkeypatch: pytest.MonkeyPatch, web: WebServer
    ) -> None:
        drips = iter([b"x" * 10] * 4)
        monkeypatch.setattr(http_store, "TIMEOUT", timedelta(seconds=0.0))

        class Answer:
            def read1(self, size: int) -> bytes:
                return next(drips)

        assert http_store._body(Answer(), 1 << 20, remote.never) == b"x" * 10  # type: ignore[arg-type]

    def test_a_read_that_breaks_for_ever_is_an_error(
        self, proxy: FaultProxy, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(remote, "RETRY_FOR", timedelta(seconds=0.5))
        for arm in (lambda: proxy.cut(100, times=10**6), lambda: proxy.unavailable(10**6)):
            arm()
            for call in (store.read, lambda name: store.read_ranges(name, [(0, 1 << 20)])):
                with pytest.raises(StorageError) as caught:
                    call("a")
                one_line(caught.value, "/set/a")
            proxy.mend()

    def test_pauses_grow_and_differ(self, monkeypatch: pytest.MonkeyPatch) -> None:
        slept: list[float] = []
        clock = [0.0]

        def sleep(seconds: float) -> None:
            slept.append(seconds)
            clock[0] += seconds

        monkeypatch.setattr(remote.time, "sleep", sleep)
        monkeypatch.setattr(remote.time, "monotonic", lambda: clock[0])
        retries, pauses = remote.Retries(), []
        for _ in range(10):
            slept.clear()
            retries.wait(remote.Passing("x"))
            pauses.append(sum(slept))
        assert all(0.05 * 2**i <= pause <= 0.15 * 2**i for i, pause in enumerate(pauses[:7]))
        assert all(5 <= pause <= 15 for pause in pauses[7:])
        assert len({round(pause / 2**i, 6) for i, pause in enumerate(pauses[:7])}) > 1
        clock[0] += 180
        with pytest.raises(remote.Passing):
            retries.wait(remote.Passing("x"))
        retries.wait(remote.Passing("x"), done=1 << 30)

    def test_nobody_there_is_soon_said(self, web: WebServer) -> None:
        with FaultProxy(web.port) as gone:
            pass
        with pytest.raises(StorageError) as caught:
            open_store(gone.endpoint).read("a")
        one_line(caught.value, gone.endpoint)

    def test_a_file_that_is_replaced_while_it_is_read(self, web: WebServer, proxy: FaultProxy, store: Store) -> None:
        web.tags = True
        new = BIG[::-1]
        proxy.cut(1 << 20)

        def replace(path: str) -> None:
            if len(web.asked) == 2:
                web.files["/set/a"] = new

        web.before = replace
        assert store.read("a") == new


class TestPoorServers:
    def test_one_that_sends_whole_files_only(self, web: WebServer) -> None:
        web.ranges = False
        store = open_store(f"{web.uri}/set")
        assert store.read("a") == BIG
        assert store.read_ranges("a", [(0, 10)]) == [BIG[:10]]
        found = store.find("a")
        assert found is not None
        assert found.size == len(BIG)
        with pytest.raises(StorageError) as caught:
            store.read_ranges("a", [(10, 10)])
        one_line(caught.value, "part of a file")

    def test_a_cut_whole_file_is_read_anew(self, web: WebServer, proxy: FaultProxy, store: Store) -> None:
        web.ranges = False
        proxy.cut(1 << 20, times=2)
        assert store.read("a") == BIG

    def test_one_that_sends_less_than_asked(self, web: WebServer) -> None:
        web.most = 1 << 20
        assert open_store(f"{web.uri}/set").read_ranges("a", [(5, 5 << 19)]) == [BIG[5 : 5 + (5 << 19)]]

    def test_one_that_sends_other_bytes(self, web: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(remote, "RETRY_FOR", timedelta(seconds=0.3))
        web.skew = 3
        with pytest.raises(StorageError, match="instead of"):
            open_store(f"{web.uri}/set").read_ranges("a", [(5, 10)])

    @pytest.mark.parametrize(("status", "words"), [(403, "access denied"), (401, "access denied"), (400, "400")])
    def test_one_that_refuses(self, web: WebServer, status: int, words: str) -> None:
        web.status = status
        with pytest.raises(StorageError) as caught:
            open_store(f"{web.uri}/set").read("a")
        one_line(caught.value, words)
        assert len(web.asked) == 1


class TestRefused:
    def test_writing(self, web: WebServer) -> None:
        store = open_store(f"{web.uri}/set")
        for call in (
            lambda: store.write("b", b""),
            lambda: store.delete(["a"]),
            lambda: store.swap("a", b"", None),
            lambda: list(store.list()),
        ):
            with pytest.raises(UserError, match=r"read-only.*build into a folder or a bucket"):
                call()
        assert web.asked == []

    @pytest.mark.parametrize(
        "uri",
        [
            "https://key:HIDDEN@host/x",
            "http://HIDDEN@host/x",
            "https://host/x?token=HIDDEN",
            "https://host/x#HIDDEN",
            "https://host:HIDDEN/x",
            "https:///HIDDEN",
            "http://",
        ],
    )
    def test_addresses(self, uri: str) -> None:
        for call in (open_store, lambda uri: open_uri(f"{uri}/a.wav"), open_uri):
            with pytest.raises(UserError) as caught:
                call(uri)
            assert "HIDDEN" not in str(caught.value)

    def test_names_that_leave_the_folder(self, web: WebServer) -> None:
        with pytest.raises(UserError, match="unsafe"):
            open_store(f"{web.uri}/set").read("../secret")

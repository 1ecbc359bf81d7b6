"""Shards fetched ahead: right bytes or a clear error, whatever happens to the line, the bucket or a process."""

from __future__ import annotations

import fcntl
import hashlib
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards import download, fetch, http_store, remote
from shards.errors import UserError
from shards.fetch import CorruptShard, ShardRef, ShardSource
from shards.storage import StorageError, open_store
from tests.buckets import Outside, one_line, patience, setenv
from tests.proxy import FaultProxy
from tests.seaweed import READ_ONLY, S3Server
from tests.webserver import WebServer, serve

PART = 1 << 18
SIZE = 5 * PART + 77
ROOT = Path(__file__).resolve().parent.parent


def content(number: int, size: int = SIZE) -> bytes:
    return random.Random(number).randbytes(size)


def ref_of(uri: str, name: str, data: bytes) -> ShardRef:
    return ShardRef(uri, name, hashlib.sha256(data).hexdigest(), len(data))


def held(folder: Path) -> int:
    """Bytes in a cache, while nobody changes it."""
    if not folder.exists():
        return 0
    with open(folder / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return sum(path.stat().st_size for path in folder.iterdir())


def settle(done: Callable[[], object], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "did not happen"
        time.sleep(0.005)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "PART", PART)
    monkeypatch.setattr(remote, "PAUSE", (0.01, 0.1))
    monkeypatch.setattr(fetch, "LOOK_AGAIN", 0.02)
    monkeypatch.setattr(fetch, "AHEAD_AGAIN", 0.05)
    monkeypatch.setattr(http_store, "TIMEOUT", timedelta(seconds=0.5))


@pytest.fixture
def source(tmp_path: Path) -> Iterator[ShardSource]:
    with ShardSource(tmp_path / "cache", 100 << 20) as source:
        yield source


@pytest.fixture
def web() -> Iterator[WebServer]:
    with serve() as server:
        yield server


def publish(web: WebServer, count: int, size: int = SIZE) -> list[ShardRef]:
    """Shards 0, 1, ... on a web server."""
    found = []
    for number in range(count):
        data = web.files[f"/set/train/{number}.tar"] = content(number, size)
        found.append(ref_of(f"{web.uri}/set", f"train/{number}.tar", data))
    return found


class TestBucket:
    @pytest.mark.parametrize("fault", ["none", "cut", "stall", "overload"])
    def test_faults_on_the_line(
        self,
        proxy: FaultProxy,
        outside: Outside,
        s3_uri: str,
        source: ShardSource,
        fault: str,
        monkeypatch: pytest.MonkeyPatch,
        recwarn: pytest.WarningsRecorder,
    ) -> None:
        patience(monkeypatch, TIMEOUT=timedelta(seconds=1))
        monkeypatch.setattr(download, "SILENCE", 0.3)
        data = content(1)
        outside.write("train/a.tar", data)
        ref = ref_of(s3_uri, "train/a.tar", data)
        {
            "none": lambda: None,
            "cut": lambda: proxy.cut(1000, times=9),
            "stall": lambda: proxy.stall(1000, 60, times=3),
            "overload": lambda: proxy.unavailable(4),
        }[fault]()
        source.want([ref], now=1)
        path = source.path(ref)
        assert path.read_bytes() == data
        assert path.name == f"{ref.sha256}.tar"
        assert source.ready(ref)
        assert source.stats.fetched_bytes == SIZE
        assert fault == "none" or sum(proxy.counts[kind] for kind in ("cut", "stall", "unavailable")) >= 3
        if fault == "stall":
            line = rf"{s3_uri}: nothing came for \d+ s; trying again for up to 180 s"
            assert 1 <= len(recwarn) <= 3
            assert all(re.fullmatch(line, str(warning.message)) for warning in recwarn)
        # In parts, several of them at once.
        assert len({asked for _, asked in proxy.asked}) >= 6

    def test_bytes_that_the_network_changed_are_fetched_again(
        self, proxy: FaultProxy, outside: Outside, s3_uri: str, source: ShardSource
    ) -> None:
        data = content(1)
        outside.write("a.tar", data)
        proxy.corrupt(at=1234)
        source.want([ref := ref_of(s3_uri, "a.tar", data)])
        assert source.path(ref).read_bytes() == data
        assert source.stats.refetched == proxy.counts["corrupt"] == 1

    @pytest.mark.parametrize("damage", ["other bytes", "shorter", "much shorter", "empty", "missing"])
    def test_a_bad_object_is_named(
        self, outside: Outside, proxy: FaultProxy, s3_uri: str, source: ShardSource, damage: str
    ) -> None:
        good, data = ref_of(s3_uri, "b.tar", content(2)), content(1)
        outside.write("b.tar", content(2))
        bad = {"other bytes": data[:-1] + b"?", "shorter": data[:-1], "much shorter": data[:9], "empty": b""}
        if damage in bad:
            outside.write("a.tar", bad[damage])
        ref = ref_of(s3_uri, "a.tar", data)
        source.want([ref, good])
        began = time.monotonic()
        for _ in range(2):
            with pytest.raises(CorruptShard) as caught:
                source.path(ref)
            one_line(caught.value, f"{s3_uri}/a.tar")
            assert caught.value.ref == ref
        assert time.monotonic() - began < 10
        assert source.path(good).read_bytes() == content(2)
        # The whole object was asked for twice, not more; the good one once.
        assert max(proxy.asked.count(asked) for asked in proxy.asked if asked[1]) <= 3
        assert source.stats.refetched == (damage != "missing")
        source.want([])
        # Mended meanwhile: wanted anew, it is looked at anew.
        outside.write("a.tar", data)
        source.want([ref])
        assert source.path(ref).read_bytes() == data

    def test_the_same_name_in_two_datasets(self, outside: Outside, s3_uri: str, source: ShardSource) -> None:
        refs = []
        for number, folder in enumerate(["x", "y"]):
            outside.write(f"{folder}/train/000000.tar", content(number))
            refs.append(ref_of(f"{s3_uri}/{folder}", "train/000000.tar", content(number)))
        source.want(refs)
        assert [source.path(ref).read_bytes() for ref in refs] == [content(0), content(1)]

    def test_refused(
        self, s3_uri: str, s3_server: S3Server, source: ShardSource, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        setenv(monkeypatch, AWS_ACCESS_KEY_ID=READ_ONLY[0], AWS_SECRET_ACCESS_KEY="WRONG")
        source.want([ref := ref_of(s3_uri, "a.tar", b"x")])
        with pytest.raises(StorageError) as caught:
            source.path(ref)
        one_line(caught.value, "access denied")

    def test_a_stalled_request_can_be_given_up(self, proxy: FaultProxy, outside: Outside, s3_uri: str) -> None:
        outside.write("a.tar", content(1))
        store = open_store(s3_uri)
        assert isinstance(store, remote.RemoteStore)
        proxy.stall(1000, 60, times=10**6)
        began = time.monotonic()
        with pytest.raises(remote.Stopped):
            store.read_some("a.tar", 0, SIZE, stopped=lambda: proxy.counts["stall"] > 0)
        assert time.monotonic() - began < 10


class TestWeb:
    @pytest.mark.parametrize("fault", ["cut", "stall", "overload", "corrupt"])
    def test_faults_on_the_line(self, web: WebServer, source: ShardSource, fault: str) -> None:
        data = content(0)
        publish(web, 1)
        with FaultProxy(web.port) as proxy:
            ref = ref_of(f"{proxy.endpoint}/set", "train/0.tar", data)
            {
                "cut": lambda: proxy.cut(1000, times=9),
                "stall": lambda: proxy.stall(1000, 60, times=3),
                "overload": lambda: proxy.unavailable(4),
                "corrupt": lambda: proxy.corrupt(1000),
            }[fault]()
            source.want([ref])
            assert source.path(ref).read_bytes() == data
        assert source.stats.retries == {"cut": 9, "stall": 3, "overload": 4, "corrupt": 0}[fault]
        assert source.stats.refetched == (fault == "corrupt")

    def test_a_server_without_ranges_is_a_clear_error(self, web: WebServer, source: ShardSource) -> None:
        ref = publish(web, 1)[0]
        web.ranges = False
        source.want([ref])
        with pytest.raises(StorageError, match="part of a file"):
            source.path(ref)

    def test_a_server_that_is_down_for_long_is_an_error_once_needed(
        self, web: WebServer, source: ShardSource, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
    ) -> None:
        monkeypatch.setattr(download, "OUTAGE", 0.1)
        monkeypatch.setattr(remote, "RETRY_FOR", timedelta(seconds=0.2))
        monkeypatch.setattr(fetch, "AHEAD_FAILED", 0.1)
        refs = publish(web, 2)
        web.status = 503
        source.want(refs)
        settle(lambda: source.stats.retries > 20)
        with pytest.raises(StorageError, match="503"):
            source.path(refs[0])
        # Once, whatever the number of parts, attempts and shards.
        line = f"{web.uri}/set: the server answers 503; trying again for up to 180 s"
        assert [str(warning.message) for warning in recwarn] == [line]
        web.status = 0
        monkeypatch.setattr(remote, "RETRY_FOR", timedelta(seconds=30))
        assert [source.path(ref).read_bytes() for ref in refs] == [content(0), content(1)]
        # The next outage is another one.
        third = publish(web, 3)[2]
        web.status = 503
        source.want([third])
        settle(lambda: len(recwarn) == 2)

    def test_first_ones_come_first(self, web: WebServer, source: ShardSource) -> None:
        refs = publish(web, 12)
        source.want(refs, now=2)
        settle(lambda: source.ready(refs[-1]))
        first = [path for path, _ in web.asked].index
        assert max(first(f"/set/{ref.name}") for ref in refs[:2]) < min(first(f"/set/{ref.name}") for ref in refs[5:])

    def test_what_is_needed_overtakes(self, web: WebServer, source: ShardSource) -> None:
        refs = publish(web, 2, size=100 * PART)
        web.before = lambda path: time.sleep(0.05)
        source.want(refs[:1])
        settle(lambda: len(web.asked) > 8)
        source.want(refs[::-1], now=1)
        source.path(refs[1])
        order = [path[-5] for path, _ in web.asked]
        last = max(place for place, number in enumerate(order) if number == "1")
        assert order[:last].count("0") < 60

    def test_what_is_no_longer_wanted_is_stopped(self, web: WebServer, source: ShardSource, tmp_path: Path) -> None:
        refs = publish(web, 1, size=100 * PART)
        web.before = lambda path: time.sleep(0.02)
        source.want(refs)
        settle(lambda: len(web.asked) > 8)
        source.want([])
        settle(lambda: held(tmp_path / "cache") == 0, seconds=5)
        assert len(web.asked) < 60


class TestCache:
    def test_a_second_source_fetches_nothing(self, web: WebServer, tmp_path: Path) -> None:
        refs = publish(web, 3)
        for expected in (0, 3):
            web.asked.clear()
            with ShardSource(tmp_path / "cache", 100 << 20) as source:
                source.want(refs, now=3)
                assert [source.path(ref).read_bytes() for ref in refs] == [content(number) for number in range(3)]
                assert source.stats.hits == expected
                assert source.stats.fetched_bytes == (3 * SIZE if not expected else 0)
        assert web.asked == []

    def test_what_does_not_fit_at_once(self, web: WebServer, tmp_path: Path) -> None:
        refs = publish(web, 3)
        with ShardSource(tmp_path / "cache", 2 * SIZE) as source:
            with pytest.raises(UserError, match=rf"3 shards.*{3 * SIZE} bytes.*data\.cache_bytes is {2 * SIZE}"):
                source.want(refs, now=3)
            source.want(refs, now=2)
            assert [source.path(ref).read_bytes() for ref in refs[:2]] == [content(0), content(1)]
            with pytest.raises(UserError, match=r"data\.cache_bytes"):
                source.path(refs[2])
            source.want([refs[2], *refs], now=1)
            assert source.path(refs[2]).read_bytes() == content(2)

    def test_shards_in_use_outlive_what_others_fetch(self, web: WebServer, tmp_path: Path) -> None:
        refs = publish(web, 8)
        with ShardSource(tmp_path / "cache", 3 * SIZE) as one, ShardSource(tmp_path / "cache", 3 * SIZE) as two:
            one.want(refs[:2], now=1)
            settle(lambda: one.ready(refs[1]))
            used = [one.path(refs[0]), one.path(refs[1])]
            for ref in refs[2:]:
                two.want([ref], now=1)
                assert two.path(ref).exists()
                assert all(path.exists() for path in used)
            one.want([refs[0]], now=1)
            two.want(refs[4:6], now=2)
            assert [two.path(ref).read_bytes() for ref in refs[4:6]] == [content(4), content(5)]
            assert not used[1].exists()
            # What was fetched ahead and evicted by others comes again when it is needed.
            one.want(refs[:2], now=1)
            two.want([])
            assert one.path(refs[1]).read_bytes() == content(1)

    def test_what_is_needed_takes_the_room_of_what_is_fetched_ahead(self, web: WebServer, tmp_path: Path) -> None:
        refs = publish(web, 4)
        slow = [False]
        web.before = lambda path: time.sleep(0.3 if slow[0] and not path.endswith("/3.tar") else 0)
        with ShardSource(tmp_path / "cache", 3 * SIZE) as source:
            slow[0] = True
            source.want(refs[:3])
            settle(lambda: held(tmp_path / "cache") == 3 * SIZE)
            source.want([refs[3], *refs], now=1)
            assert source.path(refs[3]).read_bytes() == content(3)

    @settings(max_examples=12, deadline=None)
    @given(data=st.data())
    def test_the_limit_holds(self, data: st.DataObject, shared: tuple[WebServer, list[ShardRef]]) -> None:
        web, refs = shared
        limit = data.draw(st.integers(0, 120_000))
        wants = data.draw(
            st.lists(st.tuples(st.lists(st.sampled_from(refs), max_size=6), st.integers(0, 3)), max_size=6)
        )
        cache = Path(web.files["/folder"].decode(), str(time.monotonic_ns()))
        with ShardSource(cache, limit) as one, ShardSource(cache, limit) as two:
            for turn, (wanted, now) in enumerate(wants):
                source = (one, two)[turn % 2]
                needed = {ref.sha256: ref.bytes for ref in wanted[:now]}
                try:
                    source.want(wanted, now)
                except UserError:
                    assert sum(needed.values()) > limit
                    continue
                assert sum(needed.values()) <= limit
                (two, one)[turn % 2].want([])
                assert held(cache) <= limit
                for ref in wanted[:now]:
                    assert hashlib.sha256(source.path(ref).read_bytes()).hexdigest() == ref.sha256
                    assert held(cache) <= limit

    def test_asking_again_costs_nothing(self, web: WebServer, source: ShardSource) -> None:
        refs = publish(web, 4, size=100)
        source.want(refs, now=4)
        for ref in refs:
            source.path(ref)
        began = time.perf_counter()
        for _ in range(1000):
            source.want(refs, now=4)
        assert time.perf_counter() - began < 0.2

    def test_a_folder_that_cannot_be_written(self, web: WebServer, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        ref = publish(web, 1)[0]
        with ShardSource(tmp_path / "file" / "cache", 9 * SIZE) as source:
            source.want([ref], now=1)
            with pytest.raises(UserError, match=r"data\.cache"):
                source.path(ref)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[WebServer, list[ShardRef]]]:
    with serve() as web:
        refs = []
        for number in range(8):
            data = web.files[f"/set/{number}.tar"] = content(number, 5000 * (number + 1))
            refs.append(ref_of(f"{web.uri}/set", f"{number}.tar", data))
        web.files["/folder"] = str(tmp_path_factory.mktemp("caches")).encode()
        yield web, refs


def test_a_file_is_not_closed_before_its_last_part() -> None:
    """A late part would go into whatever file has the number by then."""
    asked, answer, ended = threading.Event(), threading.Event(), threading.Event()

    def read_some(*args: object) -> bytes:
        asked.set()
        answer.wait(20)
        return b"x"

    downloader = download.Downloader(download.FetchStats())

    def run() -> None:
        store = SimpleNamespace(uri="x", read_some=read_some)
        filling = SimpleNamespace(write=lambda offset, data: None)
        with pytest.raises(remote.Stopped):
            downloader.fetch(store, "a", 1, filling, asked.is_set, lambda: True)  # type: ignore[arg-type]
        ended.set()

    threading.Thread(target=run).start()
    assert asked.wait(20)
    assert not ended.wait(0.5)
    answer.set()
    assert ended.wait(20)
    downloader.close()


CHILD = """
import sys, time
from pathlib import Path
from shards import download, fetch
from shards.fetch import ShardRef, ShardSource
download.PART = {part}
source = ShardSource(Path({cache!r}), {limit})
refs = [ShardRef(*one) for one in {refs!r}]
source.want(refs, now=len(refs))
"""


def start(body: str, cache: Path, refs: list[ShardRef], limit: int = 100 << 20) -> subprocess.Popen[str]:
    """Another process whose source wants `refs`, and that then runs `body`."""
    tuples = [(ref.uri, ref.name, ref.sha256, ref.bytes) for ref in refs]
    code = CHILD.format(part=PART, cache=str(cache), limit=limit, refs=tuples) + body
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)


class TestProcesses:
    def test_two_share_one_cache(self, web: WebServer, tmp_path: Path) -> None:
        refs = publish(web, 6)
        body = "print([source.path(ref).stat().st_size for ref in refs], source.stats.fetched_bytes)"
        children = [start(body, tmp_path / "cache", refs) for _ in range(3)]
        answers = [child.communicate(timeout=60)[0] for child in children]
        assert all(answer.startswith(str([SIZE] * 6)) for answer in answers)
        assert sum(int(answer.split()[-1]) for answer in answers) == 6 * SIZE
        assert len(web.asked) == len(set(web.asked)) == 6 * 6

    def test_another_goes_on_where_one_was_killed(self, web: WebServer, tmp_path: Path, source: ShardSource) -> None:
        refs = publish(web, 2, size=12 * PART)
        hang = [True]
        web.before = lambda path: time.sleep(60 if hang[0] and len(web.asked) > 12 else 0)
        child = start("source.path(refs[0]); source.path(refs[1])", tmp_path / "cache", refs)
        settle(lambda: len(web.asked) > 12)
        source.want(refs)
        time.sleep(0.2)
        assert not all(map(source.ready, refs))
        hang[0] = False
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        assert [source.path(ref).read_bytes() for ref in refs] == [content(number, 12 * PART) for number in range(2)]
        assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == ["", ".tar", ".tar"]

    def test_an_interrupt_reaches_one_that_waits(self, web: WebServer, tmp_path: Path) -> None:
        refs = publish(web, 1)
        web.before = lambda path: time.sleep(60)
        body = """
try:
    source.path(refs[0])
except KeyboardInterrupt:
    print("interrupted")
"""
        child = start(body, tmp_path / "cache", refs)
        settle(lambda: web.asked)
        child.send_signal(signal.SIGINT)
        assert child.communicate(timeout=20)[0] == "interrupted\n"
        assert child.returncode == 0

    @pytest.mark.usefixtures("s3_uri")
    def test_a_process_may_end_while_a_bucket_stalls(
        self, proxy: FaultProxy, outside: Outside, s3_uri: str, tmp_path: Path
    ) -> None:
        data = content(1)
        outside.write("a.tar", data)
        proxy.stall(1000, 60, times=10**6)
        body = "import time; time.sleep(1)"
        child = start(body, tmp_path / "cache", [ref_of(s3_uri, "a.tar", data)])
        settle(lambda: proxy.counts["stall"])
        began = time.monotonic()
        child.wait(timeout=20)
        assert child.returncode == 0
        assert time.monotonic() - began < 5

    def test_a_forked_process_is_told(self, web: WebServer, source: ShardSource) -> None:
        refs = publish(web, 1)
        source.want(refs, now=1)
        path = source.path(refs[0])
        child = os.fork()
        if not child:
            try:
                source.path(refs[0])
            except RuntimeError:
                os._exit(path.read_bytes() != content(0))
            os._exit(2)
        assert os.waitpid(child, 0)[1] == 0


class TestLocal:
    @pytest.fixture
    def shard(self, tmp_path: Path) -> ShardRef:
        path = tmp_path / "set" / "train" / "a.tar"
        path.parent.mkdir(parents=True)
        with tarfile.open(path, "w") as tar:
            tar.add(__file__, "member")
        return ref_of(str(tmp_path / "set"), "train/a.tar", path.read_bytes())

    def test_the_file_itself(self, shard: ShardRef, tmp_path: Path) -> None:
        with ShardSource(tmp_path / "cache", 0) as source:
            source.want([shard], now=1)
            assert source.path(shard) == Path(shard.uri, shard.name)
        assert not (tmp_path / "cache").exists()

    @pytest.mark.parametrize("damage", ["other bytes", "shorter", "missing", "a folder"])
    def test_a_bad_one_is_named(self, shard: ShardRef, source: ShardSource, damage: str) -> None:
        path = Path(shard.uri, shard.name)
        data = path.read_bytes()
        path.unlink()
        if damage == "a folder":
            path.mkdir()
        elif damage != "missing":
            path.write_bytes(data[:-1] + b"?" if damage == "other bytes" else data[:-1])
        source.want([shard])
        with pytest.raises(CorruptShard) as caught:
            source.path(shard)
        one_line(caught.value, str(path))

    def test_each_is_checked_once(self, shard: ShardRef, source: ShardSource) -> None:
        path = Path(shard.uri, shard.name)
        source.path(shard)
        path.write_bytes(path.read_bytes()[:-1] + b"?")
        source.want([])
        source.want([shard])
        assert source.path(shard) == path

    def test_unchecked_on_demand(self, shard: ShardRef, tmp_path: Path) -> None:
        path = Path(shard.uri, shard.name)
        path.write_bytes(path.read_bytes()[:-1] + b"?")
        with ShardSource(tmp_path / "cache", 0, verify=False) as source:
            assert source.path(shard) == path
            source.want([])
            path.write_bytes(b"short")
            source.want([shard])
            with pytest.raises(CorruptShard, match="5 bytes"):
                source.path(shard)

    def test_a_closed_source(self, shard: ShardRef, source: ShardSource) -> None:
        source.close()
        for call in (lambda: source.want([shard]), lambda: source.path(shard)):
            with pytest.raises(RuntimeError, match="closed"):
                call()

"""Folders and buckets as stores: whole objects or none, and versions."""

from __future__ import annotations

import hashlib
import io
import os
import random
import signal
import string
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from shards.errors import UserError
from shards.local_store import LocalStore, local_copy
from shards.storage import (
    Conflict,
    StorageError,
    Store,
    is_readable,
    is_remote,
    local_path,
    open_store,
    open_uri,
)
from tests.buckets import BIG, NAMES, names, patience

ROOT = Path(__file__).resolve().parent.parent
UNSAFE = ["../x", "/x", "a//b", "a/../../b", "a/./b", "", "a/", "a\0b"]


@pytest.fixture(params=["disk", "bucket"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty store of each kind."""
    return str(tmp_path / "store") if request.param == "disk" else request.getfixturevalue("s3_uri")


@pytest.fixture
def store(uri: str) -> Store:
    return open_store(uri)


class TestBothKinds:
    def test_objects_come_back(self, store: Store) -> None:
        before = datetime.now(timezone.utc) - timedelta(seconds=2)
        store.write("train/a.tar", b"hello")
        store.write("top", b"")
        found = store.find("train/a.tar")
        assert found is not None
        assert (found.name, found.size) == ("train/a.tar", 5)
        assert before <= found.modified <= datetime.now(timezone.utc) + timedelta(seconds=2)
        assert store.read("train/a.tar") == b"hello"
        assert store.read("top") == b""
        assert store.open("top").read() == b""
        assert store.exists("top")
        assert names(store) == ["top", "train/a.tar"]

    def test_writing_again_replaces_and_changes_the_stamp(self, store: Store) -> None:
        store.write("a", b"first")
        first = store.find("a")
        store.write("a", b"other")
        second = store.find("a")
        assert store.read("a") == b"other"
        assert first is not None
        assert second is not None
        assert first.stamp != second.stamp
        assert store.find("a") == second

    def test_ranges(self, store: Store) -> None:
        store.write("a", bytes(range(200)))
        assert store.read_ranges("a", [(150, 50), (0, 3), (1, 3), (7, 0)]) == [
            bytes(range(150, 200)),
            b"\0\1\2",
            b"\1\2\3",
            b"",
        ]
        assert store.read_ranges("a", []) == []

    def test_many_ranges_near_and_far_in_any_order(self, store: Store) -> None:
        store.write("a", BIG)
        draw = random.Random(3)
        wanted = [(draw.randrange(0, 19 << 20), draw.choice([0, 1, 1000, 1 << 20])) for _ in range(12)]
        wanted += [(0, 512), (512, 512), (256, 300), (len(BIG) - 1, 1), (0, len(BIG))]
        assert store.read_ranges("a", wanted) == [BIG[offset : offset + size] for offset, size in wanted]

    @pytest.mark.parametrize("wanted", [(190, 11), (200, 1), (900, 5)])
    def test_a_short_object_is_an_error(self, store: Store, wanted: tuple[int, int]) -> None:
        store.write("a", bytes(200))
        with pytest.raises(StorageError, match="/a: "):
            store.read_ranges("a", [(0, 4), wanted])

    def test_a_stream_reads_and_seeks_like_a_file(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("obstore")
        patience(monkeypatch, PART=1 << 16)
        data, draw = BIG[:300_001], random.Random(2)
        store.write("a", data)
        expected = io.BytesIO(data)
        with store.open("a") as stream:
            assert stream.seekable()
            for _ in range(60):
                whence = draw.choice([os.SEEK_SET, os.SEEK_CUR, os.SEEK_END])
                offset = draw.randrange(0, 300_000) - {os.SEEK_SET: 0, os.SEEK_CUR: 0, os.SEEK_END: 300_000}[whence]
                size = draw.choice([0, 1, 512, 70_000, 200_000])
                assert stream.seek(offset, whence) == expected.seek(offset, whence)
                assert stream.read(size) == expected.read(size)
                assert stream.tell() == expected.tell()
            stream.seek(0)
            assert stream.read() == data

    def test_sha256(self, store: Store) -> None:
        data = BIG[: 9 << 20]
        store.write("a", data)
        assert store.sha256("a") == hashlib.sha256(data).hexdigest()

    def test_a_missing_object(self, store: Store) -> None:
        assert store.find("no") is None
        assert not store.exists("no")
        assert store.read_version("no") is None
        assert names(store) == []
        for call in (store.read, store.open, store.sha256, lambda name: store.read_ranges(name, [(0, 1)])):
            with pytest.raises(FileNotFoundError):
                call("no")

    def test_a_folder_is_not_an_object(self, store: Store) -> None:
        store.write("train/a", b"1")
        assert store.find("train") is None
        assert not store.exists("train")

    def test_delete(self, store: Store) -> None:
        for name in ("a", "b/c", "b/d"):
            store.write(name, b"1")
        store.delete(["a", "never-was", "b/c"])
        store.delete([])
        assert names(store) == ["b/d"]

    def test_list_by_prefix(self, store: Store) -> None:
        for name in ("train/a", "train/b", "train-2/a", "tr", "columns/train/a"):
            store.write(name, b"1")
        assert names(store, "train/") == ["train/a", "train/b"]
        assert names(store, "train") == ["train-2/a", "train/a", "train/b"]
        assert names(store, "train/b") == ["train/b"]
        assert names(store, "no/such") == []
        assert len(names(store)) == 5

    @pytest.mark.parametrize("name", NAMES)
    def test_names_keep_their_characters(self, store: Store, name: str) -> None:
        store.write(name, b"1")
        assert store.read(name) == b"1"
        assert names(store) == [name]
        store.delete([name])
        assert names(store) == []

    @pytest.mark.parametrize("name", UNSAFE)
    def test_unsafe_names(self, store: Store, name: str) -> None:
        for call in (
            store.read,
            store.find,
            store.open,
            lambda name: store.write(name, b""),
            lambda n: store.delete([n]),
        ):
            with pytest.raises(UserError, match="unsafe"):
                call(name)
        with pytest.raises(UserError):
            store.swap(name, b"", None)

    def test_an_exception_publishes_nothing(self, store: Store) -> None:
        store.write("old", b"old")

        def fail() -> None:
            with store.draft() as draft:
                draft.stream.write(BIG[: 1 << 20])
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fail()
        assert names(store) == ["old"]

    def test_an_unpublished_draft_leaves_nothing(self, store: Store) -> None:
        with store.draft() as draft:
            draft.stream.write(b"1")
            assert names(store) == []
        assert names(store) == []

    def test_a_draft_is_a_file_until_it_is_published(self, store: Store) -> None:
        with store.draft() as draft:
            draft.stream.write(b"....world")
            draft.stream.seek(0)
            draft.stream.write(b"the ")
            draft.stream.seek(0, os.SEEK_END)
            draft.publish("deep/er/name")
        assert store.read("deep/er/name") == b"the world"
        assert names(store) == ["deep/er/name"]

    def test_swap_replaces_only_the_version_that_was_read(self, store: Store) -> None:
        store.swap("m", b"1", None)
        with pytest.raises(Conflict):
            store.swap("m", b"2", None)
        found = store.read_version("m")
        assert found is not None
        assert found[0] == b"1"
        store.swap("m", b"3", found[1])
        with pytest.raises(Conflict):
            store.swap("m", b"4", found[1])
        assert store.read("m") == b"3"

    def test_swap_conflicts_when_another_wrote_the_same_bytes(self, store: Store) -> None:
        store.write("m", b"1")
        found = store.read_version("m")
        assert found is not None
        store.swap("m", b"2", found[1])
        with pytest.raises(Conflict):
            store.swap("m", b"2", found[1])

    def test_swap_conflicts_when_the_object_is_gone(self, store: Store) -> None:
        store.write("m", b"1")
        found = store.read_version("m")
        assert found is not None
        store.delete(["m"])
        with pytest.raises(Conflict):
            store.swap("m", b"2", found[1])
        assert not store.exists("m")

    def test_threads_that_count_lose_nothing(self, store: Store) -> None:
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(lambda _: count(store, 8), range(6)))
        assert store.read("counter") == b"48"

    def test_processes_that_count_lose_nothing(self, uri: str) -> None:
        code = "import sys; from tests.test_storage import count, open_store; count(open_store(sys.argv[1]), 15)"
        started = [subprocess.Popen([sys.executable, "-c", code, uri], cwd=ROOT) for _ in range(3)]
        assert [process.wait(60) for process in started] == [0, 0, 0]
        assert open_store(uri).read("counter") == b"45"


def count(store: Store, times: int) -> None:
    """Add one `times` times, as every writer of a shared file must."""
    for _ in range(times):
        while True:
            found = store.read_version("counter")
            try:
                store.swap("counter", str(int(found[0]) + 1 if found else 1).encode(), found[1] if found else None)
                break
            except Conflict:
                continue


class TestDisk:
    def test_a_killed_writer_leaves_nothing(self, tmp_path: Path) -> None:
        try:
            os.close(os.open(tmp_path, os.O_TMPFILE | os.O_RDWR))
        except (OSError, AttributeError):
            pytest.skip(f"the file system of {tmp_path} keeps no nameless files")
        code = (
            "import sys, time; from shards.storage import open_store\n"
            "with open_store(sys.argv[1]).draft() as draft:\n"
            "    draft.stream.write(bytes(5 << 20)); draft.stream.flush(); print('wrote', flush=True); time.sleep(60)\n"
        )
        command = [sys.executable, "-c", code, str(tmp_path / "store")]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "wrote\n"
            writer.send_signal(signal.SIGKILL)
        assert os.listdir(tmp_path / "store") == []

    @pytest.mark.parametrize("nameless", [True, False])
    def test_modes_and_leftovers(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nameless: bool) -> None:
        if not nameless:
            monkeypatch.delattr(os, "O_TMPFILE", raising=False)
        store = LocalStore(str(tmp_path / "store"))
        before = os.umask(0o027)
        try:
            store.write("a/b", b"12345")
        finally:
            os.umask(before)
        with store.draft() as draft:
            draft.stream.write(b"1")
        assert (store.root / "a/b").stat().st_mode & 0o777 == 0o640
        assert sorted(os.listdir(store.root)) == ["a"]
        assert store.read("a/b") == b"12345"

    def test_readers_of_a_replaced_object_keep_the_old_one(self, tmp_path: Path) -> None:
        store = LocalStore(str(tmp_path))
        store.write("a", b"old")
        with store.open("a") as stream:
            store.write("a", b"new")
            assert stream.read() == b"old"
        assert store.read("a") == b"new"

    def test_a_folder_that_is_not_there_is_empty_and_stays_away(self, tmp_path: Path) -> None:
        store = LocalStore(str(tmp_path / "no" / "such"))
        assert names(store) == []
        assert store.find("a/b") is None
        store.delete(["a"])
        assert os.listdir(tmp_path) == []


class LocalModel(RuleBasedStateMachine):
    """A folder beside a dictionary: whatever is done to both, they hold the same."""

    # Names of files and of folders differ, since a disk cannot hold both under one name.
    name = st.builds(
        lambda folders, file: "/".join([*folders, file]),
        st.lists(st.sampled_from(["a", "b c", "é", ".d"]), max_size=2),
        st.text(string.ascii_uppercase + "-.ß", min_size=1, max_size=2).filter(lambda text: text not in (".", "..")),
    )

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.store = LocalStore(self.folder.name + "/store")
        self.model: dict[str, bytes] = {}

    def teardown(self) -> None:
        self.folder.cleanup()

    @rule(name=name, data=st.binary(max_size=9))
    def write(self, name: str, data: bytes) -> None:
        self.store.write(name, data)
        self.model[name] = data

    @rule(gone=st.lists(name, max_size=3))
    def delete(self, gone: list[str]) -> None:
        self.store.delete(gone)
        for name in gone:
            self.model.pop(name, None)

    @rule(name=name, data=st.binary(max_size=9), fresh=st.booleans())
    def swap(self, name: str, data: bytes, fresh: bool) -> None:
        found = self.store.read_version(name)
        assert (found[0] if found else None) == self.model.get(name)
        self.store.swap(name, data, found[1] if found else None)
        self.model[name] = data

    @rule(name=name, length=st.integers(0, 6))
    def list_prefix(self, name: str, length: int) -> None:
        prefix = name[:length]
        assert self._sizes(prefix) == {key: len(data) for key, data in self.model.items() if key.startswith(prefix)}

    @invariant()
    def same(self) -> None:
        assert self._sizes("") == {key: len(data) for key, data in self.model.items()}
        assert all(self.store.read(key) == data for key, data in self.model.items())

    def _sizes(self, prefix: str) -> dict[str, int]:
        # The lock of swaps lies in the folder too.
        return {found.name: found.size for found in self.store.list(prefix) if found.name != ".lock"}


TestLocalModel = LocalModel.TestCase
TestLocalModel.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)


class TestUris:
    @pytest.mark.parametrize(
        "uri",
        [
            "s3://key:HIDDEN@bucket/x",
            "s3://HIDDEN@bucket/x",
            "s3://bucket/x?X-Amz-Signature=HIDDEN",
            "https://key:HIDDEN@host/x",
            "S3://key:HIDDEN@bucket/x",
        ],
    )
    def test_credentials_in_a_uri_are_refused_and_not_repeated(self, uri: str) -> None:
        pytest.importorskip("obstore")
        for call in (open_store, local_path, lambda uri: open_uri(f"{uri}/a.wav")):
            with pytest.raises(UserError) as caught:
                call(uri)
            assert "HIDDEN" not in str(caught.value)

    @pytest.mark.parametrize("uri", ["s3://", "s3:///x", "s3://two words/x", "s3://b/../x", "s3://b/x//y", "s3://b/\n"])
    def test_what_is_no_bucket_or_prefix(self, uri: str) -> None:
        pytest.importorskip("obstore")
        with pytest.raises(UserError):
            open_store(uri)

    def test_kinds(self) -> None:
        assert is_remote("s3://bucket/x")
        assert is_remote("gs://bucket")
        assert not is_remote("/data/x")
        assert not is_remote("data/x")
        assert not is_remote("file:///data/x")
        assert local_path("file:///data/x") == Path("/data/x")
        assert local_path("data/x") == Path("data/x")
        for call in (is_remote, local_path, open_store):
            with pytest.raises(UserError, match="ftp"):
                call("ftp://host/x")

    def test_an_object_by_its_uri(self, uri: str) -> None:
        for odd in ("deep/a b.wav", "Talk #1/what?.wav"):
            open_store(uri).write(odd, odd.encode())
            store, name = open_uri(f"{uri}/{odd}")
            assert store.read(name) == odd.encode()
            assert is_readable(f"{uri}/{odd}")

    def test_what_can_be_opened(self, uri: str) -> None:
        open_store(uri).write("a.wav", b"1")
        assert is_readable(f"{uri}/a.wav")
        assert not is_readable(f"{uri}/b.wav")

    def test_a_local_copy_follows_its_object(
        self, store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        for data in (b"first", b"other"):
            store.write("units.npy", data)
            assert local_copy(store, "units.npy").read_bytes() == data
            assert local_copy(store, "units.npy").suffix == ".npy"
        copies = list((tmp_path / "cache").rglob("*.npy"))
        # What lies on disk needs no copy.
        assert len(copies) == (0 if isinstance(store, LocalStore) else 2)

    def test_a_file_uri_is_its_path(self, tmp_path: Path) -> None:
        open_store(str(tmp_path)).write("a", b"1")
        assert open_store(f"file://{tmp_path}").read("a") == b"1"
        store, name = open_uri(f"file://{tmp_path}/a")
        assert store.read(name) == b"1"

"""The machine's cache of shards: bounded, shared, and right after any crash."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import UserError
from shards.shard_cache import Busy, Full, Pin, ShardCache

SIZE = 1000


def sha(number: int) -> str:
    return hashlib.sha256(bytes([number])).hexdigest()


def put(cache: ShardCache, number: int, size: int = SIZE) -> Pin:
    with cache.begin(sha(number), size) as filling:
        filling.write(0, bytes([number]) * size)
        return filling.publish()


def held(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def numbers(folder: Path) -> set[int]:
    names = {sha(number): number for number in range(256)}
    return {names[path.stem] for path in folder.iterdir() if path.suffix == ".tar"}


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "deep" / "cache", 3 * SIZE)


@pytest.fixture
def other(cache: ShardCache) -> Iterator[subprocess.Popen[str]]:
    """Another process that takes commands, a line each, and answers each with a line."""
    code = f"""
import sys
from pathlib import Path
from shards.shard_cache import *
cache = ShardCache(Path({str(cache.folder)!r}), {cache.limit})
for line in sys.stdin:
    print(eval(line), flush=True)
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def tell(process: subprocess.Popen[str], command: str) -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(command + "\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


class TestShards:
    def test_what_was_published_is_found(self, cache: ShardCache) -> None:
        assert cache.take(sha(1), SIZE) is None
        assert put(cache, 1).path.read_bytes() == b"\1" * SIZE
        again = ShardCache(cache.folder, cache.limit).take(sha(1), SIZE)
        assert again is not None
        assert again.path == cache.folder / f"{sha(1)}.tar"

    def test_nothing_is_seen_before_it_is_published(self, cache: ShardCache) -> None:
        with cache.begin(sha(1), SIZE) as filling:
            filling.write(0, b"x" * SIZE)
            assert filling.read(10, 5) == b"xxxxx"
            assert cache.take(sha(1), SIZE) is None
            with pytest.raises(Busy):
                cache.begin(sha(1), SIZE)
        assert held(cache.folder) == 0
        put(cache, 1).release()
        with pytest.raises(Busy):
            cache.begin(sha(1), SIZE)

    @pytest.mark.parametrize("size", [0, SIZE - 1, SIZE + 1])
    def test_a_file_of_another_size_is_dropped(self, cache: ShardCache, size: int) -> None:
        path = cache.folder / f"{sha(1)}.tar"
        path.write_bytes(b"x" * size)
        assert cache.take(sha(1), SIZE) is None
        assert not path.exists()
        assert put(cache, 1).path.read_bytes() == b"\1" * SIZE

    def test_an_index_cannot_name_a_file_elsewhere(self, cache: ShardCache) -> None:
        for name in ("../../x", "ab", sha(1).upper(), sha(1) + "\n"):
            with pytest.raises(UserError, match="sha256"):
                cache.begin(name, 1)


class TestEviction:
    def test_the_least_recently_used_goes(self, cache: ShardCache) -> None:
        for number in (1, 2, 3):
            put(cache, number).release()
        pin = cache.take(sha(1), SIZE)
        assert pin is not None
        pin.release()
        put(cache, 4).release()
        assert numbers(cache.folder) == {1, 3, 4}

    def test_what_is_pinned_or_kept_stays(self, cache: ShardCache) -> None:
        pins = [put(cache, number) for number in (1, 2)]
        put(cache, 3).release()
        for keep in ([sha(3)], [sha(1), sha(2), sha(3)]):
            with pytest.raises(Full):
                cache.begin(sha(4), SIZE, keep)
        put(cache, 4).release()
        # Two would be needed, and only one can go: it is not lost for nothing.
        with pytest.raises(Full):
            cache.begin(sha(5), 2 * SIZE)
        assert numbers(cache.folder) == {1, 2, 4}
        pins[0].release()
        put(cache, 5, 2 * SIZE)
        assert numbers(cache.folder) == {2, 5}

    def test_pins_of_other_processes_hold(self, cache: ShardCache, other: subprocess.Popen[str]) -> None:
        for number in (1, 2, 3):
            put(cache, number).release()
        tell(other, f"globals().update(pin=cache.take({sha(1)!r}, {SIZE}))")
        put(cache, 4)
        put(cache, 5)
        with pytest.raises(Full):
            put(cache, 6)
        assert numbers(cache.folder) == {1, 4, 5}
        other.kill()
        other.wait()
        put(cache, 6)
        assert numbers(cache.folder) == {4, 5, 6}

    def test_a_smaller_limit_holds_at_once(self, cache: ShardCache) -> None:
        for number in (1, 2, 3):
            put(cache, number).release()
        (cache.folder / "notes.txt").write_bytes(b"x" * 9999)
        ShardCache(cache.folder, SIZE)
        assert numbers(cache.folder) == {3}
        assert (cache.folder / "notes.txt").exists()

    @settings(max_examples=40, deadline=None)
    @given(
        st.lists(st.tuples(st.sampled_from(["fetch", "take", "release", "abandon"]), st.integers(0, 7)), max_size=40),
        st.integers(1, 4000),
    )
    def test_the_limit_holds(
        self, tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]], limit: int
    ) -> None:
        cache = ShardCache(tmp_path_factory.mktemp("cache"), limit)
        pins: dict[int, Pin] = {}
        for step, number in steps:
            size = 300 * (number + 1)
            try:
                if step == "take" and number not in pins and (pin := cache.take(sha(number), size)):
                    pins[number] = pin
                elif step == "fetch" and number not in pins:
                    pins[number] = put(cache, number, size)
                elif step == "abandon":
                    with cache.begin(sha(number), size):
                        assert held(cache.folder) <= limit
                elif step == "release" and number in pins:
                    pins.pop(number).release()
            except Full:
                used = sum(300 * (pinned + 1) for pinned in pins)
                assert used + size > limit
            except Busy:
                assert number in numbers(cache.folder)
            assert held(cache.folder) <= limit
            assert set(pins) <= numbers(cache.folder)


class TestProcesses:
    def test_a_live_fetch_is_left_and_a_dead_one_removed(self, cache: ShardCache, other: subprocess.Popen[str]) -> None:
        tell(other, f"globals().update(filling=cache.begin({sha(1)!r}, {2 * SIZE}))")
        tell(other, "filling.write(0, b'half')")
        for _ in range(2):
            assert cache.take(sha(1), 2 * SIZE) is None
            with pytest.raises(Busy):
                cache.begin(sha(1), 2 * SIZE)
            # Its room is taken although it is not full.
            with pytest.raises(Full):
                cache.begin(sha(2), 2 * SIZE)
            ShardCache(cache.folder, cache.limit)
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
        assert held(cache.folder) == 2 * SIZE
        ShardCache(cache.folder, cache.limit)
        assert held(cache.folder) == 0
        assert put(cache, 1, 2 * SIZE).path.read_bytes() == b"\1" * 2 * SIZE

    def test_a_dead_fetch_is_taken_over(self, cache: ShardCache, other: subprocess.Popen[str]) -> None:
        tell(other, f"globals().update(filling=cache.begin({sha(1)!r}, {2 * SIZE}))")
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
        assert put(cache, 1, 2 * SIZE).path.read_bytes() == b"\1" * 2 * SIZE

    def test_a_forked_child_holds_nothing(self, cache: ShardCache) -> None:
        pin = put(cache, 1, 3 * SIZE)
        forked, tell_forked = os.pipe()
        with cache.begin(sha(2), 0):
            child = os.fork()
            if not child:
                os.write(tell_forked, b"x")
                time.sleep(30)
                os._exit(0)
        try:
            os.read(forked, 1)
            with pytest.raises(Full):
                put(cache, 3, SIZE)
            pin.release()
            put(cache, 3, SIZE)
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        assert numbers(cache.folder) == {3}


class TestErrors:
    def test_a_folder_that_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match=r"cache.*file/cache.*data\.cache"):
            ShardCache(tmp_path / "file" / "cache", SIZE)

    def test_a_full_disk(self, cache: ShardCache, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*args: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "posix_fallocate", refuse)
            with pytest.raises(UserError, match=r"disk is full.*data\.cache_bytes"):
                cache.begin(sha(1), SIZE)
        with monkeypatch.context() as patch, cache.begin(sha(1), SIZE) as filling:
            patch.setattr(os, "pwrite", refuse)
            with pytest.raises(UserError, match="disk is full"):
                filling.write(0, b"x")
        assert held(cache.folder) == 0
        put(cache, 1)

    def test_a_folder_that_was_removed_meanwhile(self, cache: ShardCache) -> None:
        put(cache, 1).release()
        shutil.rmtree(cache.folder)
        assert cache.take(sha(1), SIZE) is None
        put(cache, 1)

"""Decoding ahead: the same items, bounded, and no thread left behind however it ends."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.media import decode_video
from pipeline.prefetch import prefetched
from pipeline.stage import Reject
from tests.films import Film, shoot


def threads() -> int:
    return sum(thread.name == "prefetch" for thread in threading.enumerate())


class Source:
    """Counts what was asked of it and whether, and by whom, it was closed."""

    def __init__(self, length: int, fails: bool = False) -> None:
        self.length, self.fails = length, fails
        self.given, self.closed = 0, ""

    def items(self) -> Iterator[int]:
        try:
            for number in range(self.length):
                self.given += 1
                yield number
            if self.fails:
                raise ValueError("the source broke")
        finally:
            self.closed = threading.current_thread().name


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 40), st.integers(1, 8), st.integers(0, 45), st.booleans())
def test_items_errors_and_ends(length: int, depth: int, wanted: int, fails: bool) -> None:
    source = Source(length, fails)
    ahead = prefetched(source.items(), depth)
    got = []
    try:
        for _ in range(wanted):
            got.append(next(ahead))
            assert source.given <= len(got) + depth + 1
    except StopIteration:
        assert not fails
    except ValueError:
        assert fails
    ahead.close()  # type: ignore[attr-defined]
    assert got == list(range(min(length, wanted)))
    assert threads() == 0
    assert source.closed == ("prefetch" if wanted else "")


def test_nothing_starts_before_the_first_item() -> None:
    source = Source(3)
    ahead = prefetched(source.items(), 2)
    assert (source.given, threads()) == (0, 0)
    assert list(ahead) == [0, 1, 2]
    with pytest.raises(ValueError, match="at least 1"):
        prefetched(source.items(), 0)


def test_a_break_and_a_lost_iterator_end_the_thread() -> None:
    source = Source(1000)
    for number in prefetched(source.items(), 4):
        if number == 3:
            break
    gc.collect()
    assert threads() == 0
    assert source.given <= 9


def test_an_exception_of_the_consumer_passes() -> None:
    def consume() -> None:
        for number in prefetched(Source(10).items(), 2):
            raise KeyError(number)

    with pytest.raises(KeyError):
        consume()
    gc.collect()
    assert threads() == 0


def test_both_sides_wait_for_each_other() -> None:
    """A slow source and a slow consumer each find the other ready."""

    def slow() -> Iterator[int]:
        for number in range(5):
            time.sleep(0.01)
            yield number

    got = []
    for number in prefetched(slow(), 1):
        time.sleep(0.01 if number % 2 else 0.0)
        got.append(number)
    assert got == list(range(5))


def test_frames_of_a_film_and_its_rejection(tmp_path: Path) -> None:
    path = shoot(Film("mkv", "libx264"), tmp_path / "film.mkv")
    plain = list(decode_video(str(path)))
    ahead = list(prefetched(decode_video(str(path)), 4))
    np.testing.assert_array_equal(ahead, plain)
    assert ahead[0] is not ahead[1]
    with pytest.raises(Reject, match="none"):
        next(prefetched(decode_video(str(tmp_path / "none.mkv")), 4))
    assert threads() == 0

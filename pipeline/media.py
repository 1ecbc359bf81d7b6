"""Decode media: video as upright RGB frames with square pixels at exactly 25 Hz, sound as mono 16 kHz.

One clock serves both: zero is the first video frame (or `start` seconds after it). Every function opens the file anew,
decodes on one thread and raises `Reject` for media that cannot be used.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from fractions import Fraction
from typing import TypeVar

import numpy as np

from pipeline.container import MAX_JUMP, check_length
from pipeline.pixels import Coded, Painter, Timed, progressive
from pipeline.sound import decode_audio
from pipeline.stage import Reason, Reject
from pipeline.timeline import TOLERANCE, decoded_frames, exact, packet_times
from shards.schema import VIDEO_RATE

__all__ = ["count_frames", "decode_audio", "decode_video"]

_STEP = Fraction(1, VIDEO_RATE)
X = TypeVar("X")


def decode_video(uri: str, start: float | None = None, end: float | None = None) -> Iterator[np.ndarray]:
    """Frames at 25 Hz: RGB uint8 [H, W, 3] with square pixels, rotated upright by the file's display matrix.

    Frame k is the one on display at `start + k/25`, so any rate and variable rates come out right; a length of L
    seconds gives round(25 L) frames. A frame shown at several grid times is the same array, and one shown at none is
    never converted: do not write into frames. Interlaced frames are made whole.

    Raises:
        Reject: UNREADABLE, TRUNCATED, NO_VIDEO or TOO_SHORT (less than half a grid step). Truncation may only show
            after frames were yielded.
    """
    painter = Painter(uri)
    last: tuple[Coded, np.ndarray] | None = None
    shape: tuple[int, ...] | None = None
    for coded in _on_grid(progressive(decoded_frames(uri, start), uri), uri, start, end):
        if last is None or last[0] is not coded:
            last = coded, painter.paint(coded)
        if shape is not None and last[1].shape != shape:
            raise Reject(Reason.UNREADABLE, f"{uri}: the picture size changes on the way; cut the file there")
        shape = last[1].shape
        yield last[1]


def count_frames(uri: str, start: float | None = None, end: float | None = None) -> int:
    """The number of frames that `decode_video` yields with these arguments.

    Read from packet timestamps where the container is reliable about them, else by decoding without conversion.

    Raises:
        Reject: as `decode_video`, except that damage inside a packet is not always seen.
    """
    times = packet_times(uri)
    if times is None:
        return sum(1 for _ in _on_grid(decoded_frames(uri, start), uri, start, end))
    header, pairs = times
    return sum(1 for _ in _on_grid(((header, *pair, True) for pair in pairs), uri, start, end))


def _on_grid(frames: Iterator[Timed[X]], uri: str, start: float | None, end: float | None) -> Iterator[X]:
    """Resample frames to the 25 Hz grid: at each grid time the frame on display.

    Grid time k exists when the picture lasts at least until (k + 1/2)/25, which makes the count the rounded length.
    """
    begin = exact(start or 0)
    if begin < 0 or (end is not None and end <= begin):
        raise Reject(Reason.TOO_SHORT, f"{uri}: asks for {start} s to {end} s; start must be >= 0 and before end")
    limit = None if end is None else _round_half_up((exact(end) - begin) * VIDEO_RATE)
    half = _STEP / 2
    origin: Fraction | None = None
    shown: X | None = None
    waiting: deque[X] = deque()
    given = settled = 0
    before = Fraction(0)
    until = -begin
    promised: Fraction | None = None
    for promised, at, step, frame in frames:  # noqa: B007
        if origin is None:
            origin = at + begin
            before = at
        elif at - before > MAX_JUMP and at > origin:
            raise Reject(Reason.UNREADABLE, f"{uri}: timestamps jump by {float(at - before):.1f} s; re-encode the file")
        last = at - origin
        until = last + (step or at - before or _STEP)
        before = at
        while settled * _STEP + TOLERANCE < last:
            assert shown is not None
            waiting.append(shown)
            settled += 1
        shown = frame
        while waiting and given * _STEP + half <= last:
            yield waiting.popleft()
            given += 1
            if given == limit:
                return
    while settled * _STEP + half <= until and shown is not None:
        waiting.append(shown)
        settled += 1
    while waiting and given * _STEP + half <= until and given != limit:
        yield waiting.popleft()
        given += 1
    if given == limit:
        return
    if limit is not None:
        check_length(uri, "the picture", until + begin, exact(end or 0), "the clip asks for")
    else:
        check_length(uri, "the picture", until + begin, promised, "its header says")
    if given == 0:
        raise Reject(
            Reason.TOO_SHORT, f"{uri}: less than half a frame at {VIDEO_RATE} Hz of picture after {float(begin):.2f} s"
        )


def _round_half_up(value: Fraction) -> int:
    return (2 * value + 1).__floor__() // 2

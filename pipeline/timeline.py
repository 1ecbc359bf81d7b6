"""Decoded video frames of a file, in order of display, with their times on the container's own clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from fractions import Fraction
from heapq import heappop, heappush
from typing import Any

import av
from av.container import InputContainer

from pipeline.container import INDEXED, damaged, decode_stream, header_length, open_container, video_stream
from pipeline.pixels import Coded, Timed
from pipeline.stage import Reason, Reject
from shards.schema import VIDEO_RATE

CODED_ORDER = ("avi", "mxf")
"""Demuxers whose times of packets may be those of decoding: AVI has no others, and not every MXF file has an index."""
_MAX_REORDER = 16
"""Frames that a codec may hold back to put them in order of display (H.264, HEVC)."""
TOLERANCE = Fraction(1, 1000)
"""Containers such as Matroska round timestamps to a millisecond; a frame this late still counts as on time."""
PREROLL = 1
"""Seconds decoded before `start` after a seek, to let codecs with memory (MP3, AAC, open GOPs) settle."""


def exact(seconds: float) -> Fraction:
    """Seconds as they are meant: 1.24, not the binary number next to it, which may lie on the other side of a frame."""
    return Fraction(seconds).limit_denominator(1_000_000)


def first_time(uri: str) -> Fraction:
    """Time of the first video frame on the container's own clock, in seconds: zero of ours.

    Raises:
        Reject: UNREADABLE, TRUNCATED or NO_VIDEO.
    """
    _, first, *_ = next(decoded_frames(uri, None))
    return first


def decoded_frames(uri: str, start: float | None) -> Iterator[Timed[Coded]]:
    """Frames in order of display from the file's beginning, or from a little before `start`."""
    with open_container(uri) as container:
        stream = video_stream(container, uri)
        header = header_length(container, stream)
        indexed = container.format.name.split(",")[0] in INDEXED
        frames = _frames(container, stream, uri)
        try:
            first = next(frames)
        except StopIteration:
            if header is None:
                raise Reject(Reason.NO_VIDEO, f"{uri}: its video stream holds no frame") from None
            raise damaged(uri, "the picture", None, None) from None
        yield (header, *first)
        if start and indexed and start > 2 * PREROLL:
            target = first[0] + exact(start) - PREROLL
            container.seek(int(target / (stream.time_base or 1)), stream=stream, backward=True)
            landed = _frames(container, stream, uri)
            frame = next(landed, None)
            if frame is not None and first[0] < frame[0] <= target + TOLERANCE:
                yield (header, *frame)
                frames = landed
            else:  # the index misleads
                container.seek(0)
                frames = _frames(container, stream, uri)
        for frame in frames:
            yield (header, *frame)


def _frames(
    container: InputContainer, stream: av.VideoStream, uri: str
) -> Iterator[tuple[Fraction, Fraction | None, Coded]]:
    """Time, duration and frame, times rising. Damage before the first frame (a cut GOP) is passed over."""
    usual = 1 / Fraction(stream.average_rate or stream.guessed_rate or VIDEO_RATE)
    at: Fraction | None = None
    aspect: Fraction | None = None
    decoded = decode_stream(container, stream, uri, "the picture")
    if container.format.name in CODED_ORDER:
        decoded = _in_order(decoded)
    for frame in decoded:
        if aspect is None:  # some codecs tell it with their first frame
            aspect = Fraction(stream.sample_aspect_ratio or 1)
        step = _duration(frame)
        if frame.pts is not None:
            now = frame.pts * frame.time_base
        else:
            now = Fraction(0) if at is None else at + (step or usual)
        if at is not None and now <= at:
            continue
        at = now
        yield now, step, Coded(frame, aspect)


def _in_order(frames: Iterator[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    """Frames of a container that numbers packets in coded order: the k-th frame out has the k-th time."""
    times: list[int] = []
    waiting: deque[av.VideoFrame] = deque()
    broken: Reject | None = None
    try:
        for frame in frames:
            waiting.append(frame)
            if frame.pts is not None:
                heappush(times, frame.pts)
            if len(waiting) > _MAX_REORDER:
                yield _with_time(waiting.popleft(), times)
    except Reject as reject:
        broken = reject
    while waiting:
        yield _with_time(waiting.popleft(), times)
    if broken is not None:
        raise broken


def _with_time(frame: av.VideoFrame, times: list[int]) -> av.VideoFrame:
    frame.pts = heappop(times) if times else None
    return frame


def _duration(timed: Any) -> Fraction | None:
    """Seconds that a frame or packet lasts."""
    return timed.duration * timed.time_base if timed.duration and timed.duration > 0 else None


def packet_times(uri: str) -> tuple[Fraction | None, list[tuple[Fraction, Fraction | None]]] | None:
    """Header length and sorted (time, duration) of the frames from packets, or None where only decoding can tell."""
    with open_container(uri) as container:
        stream = video_stream(container, uri)
        if container.format.name.split(",")[0] not in INDEXED:
            return None
        header = header_length(container, stream)
        pairs: list[tuple[Fraction, Fraction | None]] = []
        try:
            for packet in container.demux(stream):
                if packet.size == 0:
                    continue
                if packet.pts is None or packet.is_corrupt or packet.is_discard or not (pairs or packet.is_keyframe):
                    return None
                pairs.append((packet.pts * packet.time_base, _duration(packet)))
        except (av.FFmpegError, ValueError):
            return None
    pairs.sort(key=lambda pair: pair[0])
    return (header, pairs) if pairs else None

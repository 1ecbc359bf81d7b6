"""Decode local media: video as upright RGB frames at exactly 25 Hz, sound as mono 16 kHz on the video's clock.

One clock serves both: zero is the first video frame (or `start` seconds after it). Every function opens the file anew,
decodes on one thread and raises `Reject` for media that cannot be used.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, TypeVar

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import Interpolation, VideoReformatter

from pipeline.container import (
    INDEXED,
    check_length,
    damaged,
    decode_stream,
    detail,
    header_length,
    open_container,
    video_stream,
)
from pipeline.stage import Reason, Reject
from shards.schema import SAMPLE_RATE, VIDEO_RATE

MAX_JUMP = 10
"""Seconds between timestamps of neighbours beyond which the clock of a file is taken as broken."""
_TOLERANCE = Fraction(1, 1000)
"""Containers such as Matroska round timestamps to a millisecond; a frame this late still counts as on time."""
_PREROLL = 1
"""Seconds decoded before `start` after a seek, to let codecs with memory (MP3, AAC, open GOPs) settle."""
_STEP = Fraction(1, VIDEO_RATE)
X = TypeVar("X")
Timed = tuple[Fraction | None, Fraction, Fraction | None, X]
"""Header length in seconds, time of a frame, its duration, the frame; None where the file does not tell."""


def decode_video(uri: str, start: float | None = None, end: float | None = None) -> Iterator[np.ndarray]:
    """Frames at 25 Hz: RGB uint8 [H, W, 3], rotated upright by the file's display matrix.

    Frame k is the one on display at `start + k/25`, so any rate and variable rates come out right; a length of L
    seconds gives round(25 L) frames. A frame shown at several grid times is the same array: do not write into it.

    Raises:
        Reject: UNREADABLE, TRUNCATED, NO_VIDEO or TOO_SHORT (less than half a grid step). Truncation may only show
            after frames were yielded.
    """
    reformatter = VideoReformatter()
    last: tuple[av.VideoFrame, np.ndarray] | None = None
    shape: tuple[int, ...] | None = None
    for frame in _on_grid(_decoded_frames(uri, start), uri, start, end):
        if last is None or last[0] is not frame:
            last = frame, _to_rgb(frame, reformatter, uri)
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
    times = _packet_times(uri)
    if times is None:
        return sum(1 for _ in _on_grid(_decoded_frames(uri, start), uri, start, end))
    header, pairs = times
    return sum(1 for _ in _on_grid(((header, *pair, True) for pair in pairs), uri, start, end))


def decode_audio(uri: str, start: float | None = None, end: float | None = None) -> np.ndarray:
    """Sound as float32 [samples], mono (mean of the channels) at 16 kHz, full scale 1.

    Sample 0 lies at the time of video frame 0: sound before it is cut, sound that begins later has zeros in front, and
    gaps in the stream are filled with zeros. The length is what the stream has, up to `end`. Places are as exact as the
    container's clock: to half a millisecond in Matroska, to a sample in mp4.

    Raises:
        Reject: UNREADABLE, TRUNCATED, NO_VIDEO or NO_AUDIO.
    """
    _, first, *_ = next(_decoded_frames(uri, None))
    origin = first + Fraction(start or 0)
    stop = None if end is None else first + Fraction(end)
    chunks: list[tuple[int, np.ndarray]] = []
    for at, samples in _audio_runs(uri, origin if start else None, stop):
        chunks.append((round((at - origin) * SAMPLE_RATE), samples))
    length = max((place + len(samples) for place, samples in chunks), default=0)
    if stop is not None:
        length = min(length, round((stop - origin) * SAMPLE_RATE))
    sound = np.zeros(max(length, 0), np.float32)
    for place, samples in chunks:
        into = sound[max(place, 0) : max(place + len(samples), 0)]
        into[:] = samples[max(-place, 0) :][: len(into)]
    return sound


def _decoded_frames(uri: str, start: float | None) -> Iterator[Timed[av.VideoFrame]]:
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
        if start and indexed and start > 2 * _PREROLL:
            target = first[0] + Fraction(start) - _PREROLL
            container.seek(int(target / (stream.time_base or 1)), stream=stream, backward=True)
            landed = _frames(container, stream, uri)
            frame = next(landed, None)
            if frame is not None and first[0] < frame[0] <= target + _TOLERANCE:
                yield (header, *frame)
                frames = landed
            else:  # the index misleads
                container.seek(0)
                frames = _frames(container, stream, uri)
        for frame in frames:
            yield (header, *frame)


def _frames(
    container: InputContainer, stream: av.VideoStream, uri: str
) -> Iterator[tuple[Fraction, Fraction | None, av.VideoFrame]]:
    """Time, duration and frame, times rising. Damage before the first frame (a cut GOP) is passed over."""
    usual = 1 / Fraction(stream.average_rate or stream.guessed_rate or VIDEO_RATE)
    at: Fraction | None = None
    for frame in decode_stream(container, stream, uri, "the picture"):
        step = _duration(frame)
        if frame.pts is not None:
            now = frame.pts * frame.time_base
        else:
            now = Fraction(0) if at is None else at + (step or usual)
        if at is not None and now <= at:
            continue
        at = now
        yield now, step, frame


def _duration(timed: Any) -> Fraction | None:
    """Seconds that a frame or packet lasts."""
    return timed.duration * timed.time_base if timed.duration and timed.duration > 0 else None


def _packet_times(uri: str) -> tuple[Fraction | None, list[tuple[Fraction, Fraction | None]]] | None:
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


def _on_grid(frames: Iterator[Timed[X]], uri: str, start: float | None, end: float | None) -> Iterator[X]:
    """Resample frames to the 25 Hz grid: at each grid time the frame on display.

    Grid time k exists when the picture lasts at least until (k + 1/2)/25, which makes the count the rounded length.
    """
    begin = Fraction(start or 0)
    if begin < 0 or (end is not None and end <= begin):
        raise Reject(Reason.TOO_SHORT, f"{uri}: asks for {start} s to {end} s; start must be >= 0 and before end")
    limit = None if end is None else _round_half_up((Fraction(end) - begin) * VIDEO_RATE)
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
        while settled * _STEP + _TOLERANCE < last:
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
        check_length(uri, "the picture", until + begin, Fraction(end or 0), "the clip asks for")
    else:
        check_length(uri, "the picture", until + begin, promised, "its header says")
    if given == 0:
        raise Reject(
            Reason.TOO_SHORT, f"{uri}: less than half a frame at {VIDEO_RATE} Hz of picture after {float(begin):.2f} s"
        )


def _round_half_up(value: Fraction) -> int:
    return (2 * value + 1).__floor__() // 2


def _to_rgb(frame: av.VideoFrame, reformatter: VideoReformatter, uri: str) -> np.ndarray:
    # Bit-exact scaling: the same pixels on every machine, whatever its vector units.
    exact = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
    try:
        picture = reformatter.reformat(frame, format="rgb24", interpolation=exact, threads=1).to_ndarray()
    except (av.FFmpegError, ValueError) as error:
        raise Reject(Reason.UNREADABLE, f"{uri}: pixel format {frame.format.name} ({detail(error)})") from None
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    return picture if matrix is None else _upright(picture, np.frombuffer(matrix, np.int32), uri)


def _upright(picture: np.ndarray, matrix: np.ndarray, uri: str) -> np.ndarray:
    """Apply a display matrix: 3x3 row-major, points as row vectors; quarter turns and mirrors only."""
    (a, b), (c, d) = (matrix.reshape(3, 3)[:2, :2] / 65536.0).tolist()
    scale = max(abs(a), abs(b), abs(c), abs(d))
    turned = abs(b) > abs(a)
    small = (a, d) if turned else (b, c)
    if scale == 0 or max(map(abs, small)) > 0.02 * scale:
        raise Reject(Reason.UNREADABLE, f"{uri}: display matrix is no quarter turn; re-encode the file upright")
    if turned:  # x' = c y, y' = b x
        picture = picture.transpose(1, 0, 2)
        across, down = c, b
    else:
        across, down = a, d
    return np.ascontiguousarray(picture[:: 1 if down > 0 else -1, :: 1 if across > 0 else -1])


def _audio_runs(uri: str, seek: Fraction | None, stop: Fraction | None) -> Iterator[tuple[Fraction, np.ndarray]]:
    """Stretches of sound without a gap: time of the first sample, mono samples at 16 kHz."""
    with open_container(uri) as container:
        stream = next(iter(container.streams.audio), None)
        if stream is None or stream.codec_context is None:
            raise Reject(Reason.NO_AUDIO, f"{uri}: has no sound stream that can be decoded")
        stream.codec_context.thread_count = 1
        header = header_length(container, stream)
        if seek is not None and container.format.name.split(",")[0] in INDEXED:
            container.seek(max(int((seek - _PREROLL) / (stream.time_base or 1)), 0), stream=stream, backward=True)
        run: _Run | None = None
        first: Fraction | None = None
        for frame in decode_stream(container, stream, uri, "the sound"):
            expected = run.until if run else Fraction(0)
            at = frame.pts * frame.time_base if frame.pts is not None else expected
            if stop is not None and at >= stop:
                break
            if run is not None and abs(at - expected) > MAX_JUMP:
                raise Reject(
                    Reason.UNREADABLE, f"{uri}: sound timestamps jump to {float(at):.1f} s; re-encode the file"
                )
            if run is None or not run.continues(frame, at):
                if run is not None:
                    yield run.begin, run.samples()
                run = _Run(frame, at)
            first = at if first is None else first
            run.add(frame)
        if run is None or first is None:
            raise Reject(Reason.NO_AUDIO, f"{uri}: its sound stream holds no sample in the clip")
        if stop is None and seek is None and header is not None:
            check_length(uri, "the sound", run.until - first, header - max(first, Fraction(0)), "its header says")
        yield run.begin, run.samples()


class _Run:
    """Sound frames that follow each other without a gap and share rate, layout and format."""

    def __init__(self, frame: av.AudioFrame, begin: Fraction) -> None:
        self.begin = self.until = begin
        self._kind = self._kind_of(frame)
        # Channels are kept through resampling: the decoder's own mixdown to mono is not a plain mean.
        self._resampler = av.AudioResampler(format="fltp", layout=frame.layout, rate=SAMPLE_RATE)
        self._parts: list[np.ndarray] = []

    @staticmethod
    def _kind_of(frame: av.AudioFrame) -> tuple[int, str, str]:
        return frame.sample_rate, frame.layout.name, frame.format.name

    def continues(self, frame: av.AudioFrame, at: Fraction) -> bool:
        """Whether a frame belongs here; timestamps may wander by one video frame."""
        return abs(at - self.until) <= Fraction(1, VIDEO_RATE) and self._kind == self._kind_of(frame)

    def add(self, frame: av.AudioFrame) -> None:
        self.until += Fraction(frame.samples, frame.sample_rate)
        frame.pts = None  # the resampler would otherwise fill small timestamp errors
        self._take(frame)

    def samples(self) -> np.ndarray:
        """All samples of the run, float32, mono."""
        self._take(None)
        return np.concatenate(self._parts) if self._parts else np.zeros(0, np.float32)

    def _take(self, frame: av.AudioFrame | None) -> None:
        for part in self._resampler.resample(frame):
            self._parts.append(part.to_ndarray().mean(axis=0, dtype=np.float32))

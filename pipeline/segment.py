"""Long recordings cut into clips: spans inside one shot in which the same faces stay.

A recording is looked through once: every frame for shot changes, every few frames for faces. What is held of it are a
few numbers per frame, so its length does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field, model_validator
from typing_extensions import Self

from pipeline.stage import Clip, Reason, Reject
from pipeline.tracks import join_tracks
from shards.config import Config
from shards.schema import SAMPLE_RATE, VIDEO_RATE

if TYPE_CHECKING:
    from pipeline.networks.anchors import Faces as Detections

Detect = Callable[[Sequence[np.ndarray]], "list[Detections]"]
"""Faces of each RGB frame, uint8 [H, W, 3]."""
_PAUSE = 5
"""Frames over which sound is averaged when the quietest place is looked for."""


class SegmentConfig(Config):
    """Cutting of recordings into clips before anything else.

    Attributes:
        enabled: whether a source's videos are recordings to be cut. `--segment` sets it.
        min_seconds: a shorter stay of a face is left out.
        max_seconds: a longer one is cut at the quietest place of its second half, again and again.
        every: faces are looked for in every such frame; segments begin and end at these.
        background: a face smaller than this share of the largest one there does not count.
    """

    enabled: bool = False
    min_seconds: float = Field(1.0, ge=0.2)
    max_seconds: float = Field(24.0, le=500)
    every: int = Field(5, ge=1, le=25)
    background: float = Field(0.5, gt=0, le=1)

    @model_validator(mode="after")
    def _room(self) -> Self:
        if self.max_seconds < 2 * self.min_seconds:
            raise ValueError("max_seconds must be at least twice min_seconds")
        return self


@dataclass(frozen=True)
class Rules:
    """What decides where a recording is cut: the section `segment`, and of `faces` what ends shots and joins faces."""

    segment: SegmentConfig
    cut: float
    track_overlap: float
    max_gap: int


class Segment(Config):
    """A clip of a recording: seconds on the recording's clock, and how many faces are there all the time."""

    start: float
    end: float
    faces: int


class LeftOut(Config):
    """A part of a recording that is in no segment: without a face, or with faces that do not stay (`too_short`)."""

    start: float
    end: float
    reason: Reason


@dataclass(frozen=True)
class Found:
    """What is in a recording.

    Attributes:
        frames: of the recording at 25 Hz.
        cuts: seconds at which a shot begins, but the first.
        segments, left_out: in order; together they are the recording.
        refused: why there is no segment, or why the recording is not whole.
    """

    frames: int
    cuts: list[float]
    segments: list[Segment]
    left_out: list[LeftOut]
    refused: Reject | None


@dataclass(frozen=True)
class Stay:
    """A face that stays: the frames in which it was seen, rising, and its mean width + height in pixels."""

    frames: np.ndarray
    size: float

    @property
    def begin(self) -> int:
        return int(self.frames[0])

    @property
    def end(self) -> int:
        return int(self.frames[-1]) + 1


@dataclass(frozen=True)
class Span:
    """Frames `begin` to `end`, exclusive, and the number of faces in them."""

    begin: int
    end: int
    faces: int


def find_segments(recording: Clip, rules: Rules, detect: Detect, batch: int) -> Found:
    """Look through a recording, `batch` frames per call of the detector.

    A recording that breaks off on the way gives the segments before that.

    Raises:
        Reject: it gives no frame at all.
    """
    from pipeline.media import decode_video
    from pipeline.shots import ShotFinder

    shots = ShotFinder(rules.cut)
    seen: list[Detections] = []
    looked: list[np.ndarray] = []
    frames = 0
    broken: Reject | None = None
    try:
        for frame in decode_video(recording.uri, recording.start, recording.end):
            shots.add(frame)
            if frames % rules.segment.every == 0:
                looked.append(frame)
            frames += 1
            if len(looked) == batch:
                seen += detect(looked)
                looked = []
    except Reject as reject:
        if not frames:
            raise
        broken = reject
    if looked:
        seen += detect(looked)
    cuts = shots.finish()
    spans: list[Span] = []
    for begin, end in zip([0, *cuts], [*cuts, frames], strict=True):
        spans += spans_of(_stays(seen, begin, end, rules), rules.segment)
    spans = [piece for span in spans for piece in _pieces(recording, span, rules.segment)]
    return _found(recording, frames, cuts, spans, seen, rules, broken)


def spans_of(stays: Sequence[Stay], config: SegmentConfig) -> list[Span]:
    """Spans of one shot in which the set of faces stays the same; parts shorter than `min_seconds` are left out.

    A face counts where it lasts for `min_seconds` and is not a small one in the background of another. Spans begin when
    all of their faces have been seen, and end when the first is seen for the last time.
    """
    least = config.min_seconds * VIDEO_RATE
    lasting = [stay for stay in stays if stay.end - stay.begin >= least]
    bounds = sorted({place for stay in lasting for place in (stay.begin, stay.end)})
    parts: list[tuple[int, int, list[Stay]]] = []
    for begin, end in pairwise(bounds):
        there = [stay for stay in lasting if stay.begin <= begin and end <= stay.end]
        largest = max((stay.size for stay in there), default=0.0)
        there = [stay for stay in there if stay.size >= config.background * largest]
        if parts and [id(stay) for stay in parts[-1][2]] == [id(stay) for stay in there]:
            parts[-1] = (parts[-1][0], end, there)
        else:
            parts.append((begin, end, there))
    spans = []
    for begin, end, there in parts:
        inside = [stay.frames[(begin <= stay.frames) & (stay.frames < end)] for stay in there]
        if there and all(len(frames) for frames in inside):
            span = Span(
                max(int(frames[0]) for frames in inside), min(int(frames[-1]) for frames in inside) + 1, len(there)
            )
            if span.end - span.begin >= least:
                spans.append(span)
    return spans


def _stays(seen: Sequence[Detections], begin: int, end: int, rules: Rules) -> list[Stay]:
    """Tracks of the shot from frame `begin` to `end`; `seen` has every so many frames of the recording."""
    every = rules.segment.every
    first, last = -(-begin // every), -(-end // every)
    # No longer without a look at the face than the faces stage will bridge.
    gap = max((rules.max_gap + 1) // every - 1, 0)
    tracks = join_tracks(list(seen[first:last]), rules.track_overlap, gap)
    return [Stay((np.array(sorted(track.boxes)) + first) * every, track.size) for track in tracks]


def _pieces(recording: Clip, span: Span, config: SegmentConfig) -> list[Span]:
    """A span in parts of at most `max_seconds`: cut where it is quietest, without usable sound into equal parts."""
    most, least = int(config.max_seconds * VIDEO_RATE), int(np.ceil(config.min_seconds * VIDEO_RATE))
    if span.end - span.begin <= most:
        return [span]
    sound = _has_sound(recording.uri)
    bounds = [span.begin]
    while span.end - bounds[-1] > most:
        begin = bounds[-1]
        rest = span.end - begin
        equal = begin - (-rest // -(-rest // most))
        latest = min(begin + most, span.end - least)
        at = _quietest(recording, min(begin + most // 2, latest), latest) if sound else None
        bounds.append(equal if at is None else at)
    return [Span(*pair, span.faces) for pair in zip(bounds, [*bounds[1:], span.end], strict=True)]


def _has_sound(uri: str) -> bool:
    """Whether any part of the sound can be had without decoding all that is before it."""
    from pipeline.container import INDEXED, open_container

    with open_container(uri) as container:
        return bool(container.streams.audio) and container.format.name.split(",")[0] in INDEXED


def _quietest(recording: Clip, begin: int, end: int) -> int | None:
    """The frame between two, both included, about which the sound is weakest; None without sound there."""
    from pipeline.sound import decode_audio

    try:
        sound = decode_audio(recording.uri, seconds(recording, begin), seconds(recording, end + 1))
    except Reject:
        return None
    hop = SAMPLE_RATE // VIDEO_RATE
    length = (end + 1 - begin) * hop
    sound = np.pad(sound[:length], (0, max(length - len(sound), 0)))
    power = (sound.reshape(-1, hop).astype(np.float64) ** 2).mean(axis=1)
    smooth = np.convolve(np.pad(power, _PAUSE // 2, mode="edge"), np.ones(_PAUSE), "valid")
    return begin + int(np.argmin(smooth))


def seconds(recording: Clip, frame: int) -> float:
    """Time of a frame of the recording on its media's clock."""
    from pipeline.timeline import exact

    return float(exact(recording.start or 0) + Fraction(frame, VIDEO_RATE))


def _found(
    recording: Clip,
    frames: int,
    cuts: Sequence[int],
    spans: Sequence[Span],
    seen: Sequence[Detections],
    rules: Rules,
    broken: Reject | None,
) -> Found:
    def at(frame: int) -> float:
        return seconds(recording, frame)

    every = rules.segment.every
    with_face = np.array([len(faces.boxes) > 0 for faces in seen])
    left_out = []
    for begin, end in zip([0, *(span.end for span in spans)], [*(span.begin for span in spans), frames], strict=True):
        if begin < end:
            looks = with_face[-(-begin // every) : -(-end // every)]
            reason = Reason.NO_FACE if len(looks) and not looks.any() else Reason.TOO_SHORT
            left_out.append(LeftOut(start=at(begin), end=at(end), reason=reason))
    refused = broken
    if not spans and broken is None:
        some = with_face.any()
        words = f"no face stays for {rules.segment.min_seconds:g} s" if some else "no face"
        refused = Reject(
            Reason.TOO_SHORT if some else Reason.NO_FACE,
            f"{recording.uri}: {words} in {frames / VIDEO_RATE:.1f} s of picture (every frame of {every} looked at)",
        )
    return Found(
        frames,
        [at(frame) for frame in cuts],
        [Segment(start=at(span.begin), end=at(span.end), faces=span.faces) for span in spans],
        left_out,
        refused,
    )

"""Decode sound as mono 16 kHz on the video's clock: zero is the first video frame, or `start` seconds after it.

Channels are mixed by a rule that is decided once per clip, from what its channels hold (`mix`).
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import av
import numpy as np
from numpy.typing import NDArray

from pipeline.container import INDEXED, MAX_JUMP, check_length, decode_stream, header_length, open_container
from pipeline.stage import Reason, Reject
from pipeline.timeline import PREROLL, exact, first_time
from shards.schema import SAMPLE_RATE, VIDEO_RATE

SILENT = 30.0
"""A channel this many dB below the loudest holds no signal of its own: hiss or crosstalk of an open input."""
OPPOSED = -0.8
"""Correlation with a loud channel below which a channel is that one with its sign turned.

A voice of power V in phase and music of power M in opposite phase correlate as (V - M) / (V + M): what is turned has
music at least nine times as strong as the voice. A turned voice with independent noise of power R in each channel
correlates as -V / (V + R): it is recognised from 6 dB above the noise on.
"""
CENTRE = 20.0
"""The front centre of a surround mix is taken alone unless it is this many dB below the loudest channel."""
Places = list[tuple[int, NDArray[np.float32]]]


def decode_audio(uri: str, start: float | None = None, end: float | None = None) -> NDArray[np.float32]:
    """Sound as float32 [samples], mono (see `mix`) at 16 kHz, full scale 1.

    Sample 0 lies at the time of video frame 0: sound before it is cut, sound that begins later has zeros in front, and
    gaps in the stream are filled with zeros. The length is what the stream has, up to `end`. Places are as exact as the
    container's clock: to half a millisecond in Matroska, to a sample in mp4. All channels are held until the end, 64 kB
    per channel and second.

    Raises:
        Reject: UNREADABLE, TRUNCATED, NO_VIDEO or NO_AUDIO.
    """
    first = first_time(uri)
    origin = first + exact(start or 0)
    stop = None if end is None else first + exact(end)
    layouts: dict[tuple[str, ...], Places] = {}
    length = 0
    for at, names, samples in stretches(uri, origin if start else None, stop):
        place = round((at - origin) * SAMPLE_RATE)
        length = max(length, place + samples.shape[1])
        if place < 0:
            place, samples = 0, samples[:, -place:]
        if samples.shape[1]:
            layouts.setdefault(names, []).append((place, samples))
    if stop is not None:
        length = min(length, round((stop - origin) * SAMPLE_RATE))
    sound = np.zeros(max(length, 0), np.float32)
    for names, runs in layouts.items():  # more than one where a broadcast changes its layout on the way
        pieces = [(place, samples[:, : max(length - place, 0)]) for place, samples in runs]
        weights = mix([piece for _, piece in pieces], names)
        for place, piece in pieces:
            sound[place : place + piece.shape[1]] = mean(piece, weights)
    return sound


def mix(pieces: list[NDArray[np.float32]], names: tuple[str, ...]) -> NDArray[np.float32]:
    """Sign of each channel in the mean, 0 for a channel that is left out; float32 [channels].

    A surround mix (it has a front centre among more than two channels) speaks from its centre, which is taken alone
    where it is not nearly silent. Otherwise, without the low-frequency channel: channels that are silent beside the
    loudest are left out, and channels that are a loud one with its sign turned are turned back. Ordinary mono and
    stereo give ones: the plain mean.

    Args:
        pieces: stretches of the clip, float32 [channels, samples] each.
        names: of the channels (FL, FR, FC, LFE ...).
    """
    weights = np.ones(len(names), np.float32)
    if len(names) == 1:
        return weights
    products = _covariance(pieces, len(names))
    power = products.diagonal().copy()
    if len(names) > 2:
        low = np.array([name.startswith("LFE") for name in names])
        if not low.all():
            power[low] = 0
            weights[low] = 0
    loudest = int(power.argmax())
    if power[loudest] <= 0:
        return weights
    if len(names) > 2 and "FC" in names:
        centre = names.index("FC")
        if power[centre] > power[loudest] * 10 ** (-CENTRE / 10):
            weights[:] = 0
            weights[centre] = 1
            return weights
    weights[power <= power[loudest] * 10 ** (-SILENT / 10)] = 0
    # Of channels about as loud (3 dB) the first keeps its sign, so that noise does not decide it.
    model = int((power >= power[loudest] / 2).argmax())
    with np.errstate(invalid="ignore", divide="ignore"):
        alike = products[model] / np.sqrt(power * power[model])
    weights[(weights > 0) & (alike < OPPOSED)] = -1
    return weights


def _covariance(pieces: list[NDArray[np.float32]], channels: int) -> NDArray[np.float64]:
    """Sums of products of the channels without their means, float64 [channels, channels]."""
    total = max(sum(piece.shape[1] for piece in pieces), 1)
    mean = sum((piece.sum(1, dtype=np.float64) for piece in pieces), np.zeros(channels)) / total
    products = np.zeros((channels, channels))
    for piece in pieces:
        for at in range(0, piece.shape[1], SAMPLE_RATE):
            part = piece[:, at : at + SAMPLE_RATE] - mean[:, None]
            products += np.einsum("in,jn->ij", part, part)
    return products


def mean(piece: NDArray[np.float32], weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mean of the channels that count, with their signs."""
    counted = weights != 0
    if not (weights == 1).all():
        piece = piece[counted] * weights[counted, None]
    return piece.mean(axis=0, dtype=np.float32)


def stretches(
    uri: str, seek: Fraction | None = None, stop: Fraction | None = None
) -> Iterator[tuple[Fraction, tuple[str, ...], NDArray[np.float32]]]:
    """Stretches of sound without a gap at 16 kHz: time of the first sample, channel names, float32 [channels, samples].

    Raises:
        Reject: UNREADABLE, TRUNCATED or NO_AUDIO.
    """
    with open_container(uri) as container:
        stream = next((stream for stream in container.streams.audio if stream.codec_context is not None), None)
        if stream is None:
            raise Reject(Reason.NO_AUDIO, f"{uri}: has no sound stream that can be decoded")
        stream.codec_context.thread_count = 1
        header = header_length(container, stream)
        if seek is not None and container.format.name.split(",")[0] in INDEXED:
            container.seek(max(int((seek - PREROLL) / (stream.time_base or 1)), 0), stream=stream, backward=True)
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
                    yield run.begin, run.names, run.samples()
                run = _Run(frame, at)
            first = at if first is None else first
            run.add(frame)
        if run is None or first is None:
            raise Reject(Reason.NO_AUDIO, f"{uri}: its sound stream holds no sample in the clip")
        if stop is None and seek is None and header is not None:
            check_length(uri, "the sound", run.until - first, header - max(first, Fraction(0)), "its header says")
        yield run.begin, run.names, run.samples()


class _Run:
    """Sound frames that follow each other without a gap and share rate, layout and format."""

    def __init__(self, frame: av.AudioFrame, begin: Fraction) -> None:
        self.begin = self.until = begin
        self.names = tuple(channel.name for channel in frame.layout.channels)
        self._kind = self._kind_of(frame)
        # Channels are kept through resampling: the decoder's own mixdown to mono follows other rules than ours.
        self._resampler = av.AudioResampler(format="fltp", layout=frame.layout, rate=SAMPLE_RATE)
        self._parts: list[NDArray[np.float32]] = []

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

    def samples(self) -> NDArray[np.float32]:
        """All samples of the run, float32 [channels, samples]."""
        self._take(None)
        return np.concatenate(self._parts, axis=1) if self._parts else np.zeros((len(self.names), 0), np.float32)

    def _take(self, frame: av.AudioFrame | None) -> None:
        self._parts += [np.asarray(part.to_ndarray(), np.float32) for part in self._resampler.resample(frame)]

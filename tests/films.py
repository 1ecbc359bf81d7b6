"""Short films whose frames show their number and whose sound has one click, in any container and codec."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np

CLICK = 0.48
"""Seconds of the click's middle: when frame 12 at 25 Hz comes up."""
FRAMES = 25


@dataclass(frozen=True)
class Film:
    """How a film is coded: container (file ending), codecs, and what they ask for."""

    ending: str
    video: str
    audio: str | None = None
    size: tuple[int, int] = (64, 48)
    pixels: str = "yuv420p"
    rate: int = 48_000
    layout: str = "mono"
    options: dict[str, str] = field(default_factory=dict)
    container: dict[str, str] = field(default_factory=dict)
    format: str | None = None
    every_frame_whole: bool = False
    lag: float = 1.0
    """Samples at 16 kHz by which the click may be misplaced."""

    def __str__(self) -> str:
        return "-".join(filter(None, (self.ending, self.video, self.audio)))


def picture(number: int, size: tuple[int, int]) -> np.ndarray:
    """RGB [H, W, 3]: `number` in binary, low bit left, below a bright bar."""
    bits = np.repeat([50 + 150 * (number >> bit & 1) for bit in range(8)], size[0] // 8)
    drawn = np.empty((size[1], size[0], 3), np.uint8)
    drawn[:] = bits[None, :, None]
    drawn[: size[1] // 3] = 255
    return drawn


def indices(frames: Sequence[np.ndarray]) -> list[int]:
    """The number that each frame shows."""
    bits = [frame[-16:].mean((0, 2)).reshape(8, -1).mean(1) > 125 for frame in frames]
    return [int(np.packbits(bit, bitorder="little")[0]) for bit in bits]


def click(rate: int, seconds: float = 1.0, middle: float = CLICK) -> np.ndarray:
    """Float [samples]: a 1 kHz burst of some milliseconds."""
    time = np.arange(round(seconds * rate)) / rate - middle
    return 0.5 * np.exp(-0.5 * (time / 0.004) ** 2) * np.cos(2 * np.pi * 1000 * time)


def lag(sound: np.ndarray, middle: float = CLICK) -> float:
    """Samples at 16 kHz by which the click comes late, from the peak of the envelope of a cross-correlation."""
    time = np.arange(len(sound)) / 16_000 - middle
    burst = np.exp(-0.5 * (time / 0.004) ** 2) * np.exp(2j * np.pi * 1000 * time)
    length = 1 << 17
    product = np.fft.fft(sound, length) * np.conj(np.fft.fft(burst, length))
    product[length // 2 :] = 0
    envelope = np.abs(np.fft.ifft(product))
    peak = int(envelope.argmax())
    before, top, after = envelope[peak - 1], envelope[peak], envelope[(peak + 1) % length]
    found = peak + 0.5 * (before - after) / (before - 2 * top + after)
    return float(found - length if found > length / 2 else found)


def shoot(
    film: Film,
    path: Path,
    times: Sequence[Fraction] | None = None,
    sound: np.ndarray | None = None,
    sound_at: float = 0.0,
    aspect: Fraction | None = None,
) -> Path:
    """Encode a film.

    Args:
        times: seconds of its frames; by default one second at 25 Hz.
        sound: float [samples] or [samples, channels]; by default a second with the click.
        sound_at: seconds of the sound's first sample.
        aspect: of a pixel, width over height.
    """
    times = [Fraction(k, 25) for k in range(FRAMES)] if times is None else times
    steps = {after - before for before, after in pairwise(times)}
    even = len(steps) <= 1
    with av.open(str(path), "w", format=film.format, options=film.container) as container:
        video = container.add_stream(film.video, rate=1 / steps.pop() if even and steps else 25, options=film.options)
        video.width, video.height, video.pix_fmt = *film.size, film.pixels
        context = video.codec_context
        context.thread_count = 1
        if not even:
            context.time_base = Fraction(1, 1000)
        if film.video in (
            "mpeg4",
            "msmpeg4",
            "mpeg1video",
            "mpeg2video",
            "wmv1",
            "wmv2",
            "flv",
            "h263",
            "mjpeg",
            "rv20",
        ):
            context.qmin = context.qmax = 2
        if film.every_frame_whole:
            context.gop_size = 0
        if film.pixels.startswith("yuvj"):
            context.color_range = 2
        if aspect is not None:
            context.sample_aspect_ratio = aspect
        audio = None
        if film.audio is not None:
            audio = container.add_stream(film.audio, rate=film.rate, layout=film.layout)
            if film.audio.startswith("wma"):
                audio.codec_context.bit_rate = 96_000
            if film.audio == "vorbis":
                audio.codec_context.options = {"strict": "-2"}
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(picture(number, film.size), format="rgb24")
            frame.time_base = 1 / Fraction(context.framerate) if even else Fraction(1, 1000)
            frame.pts = round(time / frame.time_base)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if audio is not None:
            samples = click(film.rate) if sound is None else sound
            channels = audio.codec_context.layout.nb_channels
            if samples.ndim == 1:
                samples = np.repeat(samples[:, None], channels, 1)
            block = av.AudioFrame.from_ndarray(
                (samples * 32767).astype(np.int16).reshape(1, -1), format="s16", layout=film.layout
            )
            block.sample_rate, block.time_base = film.rate, Fraction(1, film.rate)
            block.pts = round(sound_at * film.rate)
            container.mux(audio.encode(block))
            container.mux(audio.encode(None))
    return path

"""Mel picture and pitch curves of a sound, as SVG with the picture in it."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.evaluation.html import escape
from shards.mel import Filterbank, log_mel, mel_filters
from shards.schema import HOP, MEL_RATE, SAMPLE_RATE

Floats = NDArray[np.float32]

COLOURS = ((7, 8, 28), (52, 16, 92), (126, 30, 108), (196, 55, 84), (238, 112, 62), (252, 184, 96), (253, 246, 206))
"""From quiet to loud, each lighter than the one before, so that the picture reads in grey as well."""
DARKEST = 2.0
"""Percentile of a clip's log-mels that is shown darkest; below it lies mostly the floor of digital silence."""
SHORTEST = 1280
"""Samples that a sound is filled up to for its picture."""

WIDTH, LEFT, RIGHT = 560, 54, 6
MEL_TOP, MEL_HEIGHT, PITCH_TOP, PITCH_HEIGHT, HEIGHT = 6, 170, 190, 96, 316


@dataclass(frozen=True)
class Track:
    """What is drawn of a sound: log-mel [T, 80] and pitch [T] in Hz, NaN where unvoiced."""

    mel: Floats
    pitch: Floats
    seconds: float


@dataclass(frozen=True)
class Scales:
    """Axes that all systems share for a clip: seconds, ln amplitude from darkest to lightest, Hz from bottom to top."""

    seconds: float
    loudness: tuple[float, float]
    hertz: tuple[float, float]
    filterbank: Filterbank


def track(samples: Floats, filterbank: Filterbank, fmin: float, fmax: float) -> Track:
    """Mel and pitch of a mono 16 kHz signal [N]."""
    from pipeline.stages.pitch import track_pitch

    whole = np.pad(samples, (0, max(0, SHORTEST - len(samples))))
    return Track(log_mel(whole, filterbank), track_pitch(whole, fmin, fmax), len(samples) / SAMPLE_RATE)


def scales(tracks: Iterable[Track], filterbank: Filterbank) -> Scales:
    """Axes on which the sounds of one clip can be compared."""
    tracks = list(tracks)
    mels = np.concatenate([one.mel.ravel() for one in tracks])
    low, high = float(np.percentile(mels, DARKEST)), float(mels.max())
    voiced = np.concatenate([one.pitch[~np.isnan(one.pitch)] for one in tracks])
    hertz = (float(voiced.min()), float(voiced.max())) if len(voiced) else (80.0, 240.0)
    margin = max(10.0, 0.08 * (hertz[1] - hertz[0]))
    return Scales(
        max(one.seconds for one in tracks),
        (low, max(high, low + 1)),
        (max(0.0, hertz[0] - margin), hertz[1] + margin),
        filterbank,
    )


def mel_png(mel: Floats, loudness: tuple[float, float]) -> bytes:
    """A pixel per frame and bin, low frequencies at the bottom; PNG with a palette of `COLOURS`."""
    from PIL import Image

    low, high = loudness
    grey = np.clip((mel.T[::-1] - low) / (high - low) * 255, 0, 255).round().astype(np.uint8)
    places = np.linspace(0, 255, len(COLOURS))
    palette = np.stack([np.interp(np.arange(256), places, channel) for channel in zip(*COLOURS, strict=True)], 1)
    image = Image.fromarray(grey, "P")
    image.putpalette(palette.round().astype(np.uint8).tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def bin_of(hertz: float, filterbank: Filterbank) -> float:
    """Place of a frequency among the 80 bins: 0 at the first one's centre."""
    filters = mel_filters(filterbank)
    bins = np.arange(filters.shape[1]) * (SAMPLE_RATE / 2) / (filters.shape[1] - 1)
    centres = (filters @ bins) / filters.sum(1)
    if hertz > centres[-1]:
        return float(len(centres) - 1 + (hertz - centres[-1]) / (centres[-1] - centres[-2]))
    return float(np.interp(hertz, centres, np.arange(len(centres))))


def picture(name: str, own: Track, reference: Track | None, axes: Scales) -> str:
    """SVG: the mel above, the pitch below on the same seconds; the reference's pitch is dashed.

    Args:
        name: of the system, for those who cannot see the picture.
        reference: None where `own` is the reference.
    """
    wide = WIDTH - LEFT - RIGHT

    def x(seconds: float) -> float:
        return LEFT + wide * seconds / axes.seconds

    def y(hertz: float) -> float:
        low, high = axes.hertz
        return PITCH_TOP + PITCH_HEIGHT * (1 - (hertz - low) / (high - low))

    bins = own.mel.shape[1]
    png = base64.b64encode(mel_png(own.mel, axes.loudness)).decode()
    across = x(len(own.mel) / MEL_RATE) - LEFT
    parts = [
        f'<svg class="picture" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" data-seconds="{axes.seconds:.4f}" '
        f'data-left="{LEFT}" data-wide="{wide}"><title>{escape(f"Mel spectrogram and pitch of {name}")}</title>',
        f'<rect class="pit" x="{LEFT}" y="{MEL_TOP}" width="{wide}" height="{MEL_HEIGHT}"/>',
        f'<image x="{LEFT}" y="{MEL_TOP}" width="{min(across, wide):.2f}" height="{MEL_HEIGHT}" '
        f'preserveAspectRatio="none" href="data:image/png;base64,{png}"/>',
        f'<rect class="frame" x="{LEFT}" y="{PITCH_TOP}" width="{wide}" height="{PITCH_HEIGHT}"/>',
    ]
    for kilo in (0.5, 1, 2, 4, 8):
        place = bin_of(1000 * kilo, axes.filterbank)
        high = MEL_TOP + MEL_HEIGHT * (1 - min(1, (place + 0.5) / bins))
        parts.append(_label(LEFT - 6, high, f"{kilo:g}", "end") + _tick(LEFT - 4, high, LEFT, high))
    parts.append(_label(9, MEL_TOP + MEL_HEIGHT / 2, "kHz", "middle", turned=True))
    for hertz in _round_values(*axes.hertz, 3):
        parts.append(_label(LEFT - 6, y(hertz), f"{hertz:g}", "end"))
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{LEFT + wide}" y1="{y(hertz):.1f}" y2="{y(hertz):.1f}"/>')
    parts.append(_label(9, PITCH_TOP + PITCH_HEIGHT / 2, "Hz", "middle", turned=True))
    bottom = PITCH_TOP + PITCH_HEIGHT
    for seconds in _round_values(0, axes.seconds, 6):
        unit = " s" if seconds == 0 else ""
        parts.append(_label(x(seconds), bottom + 16, f"{seconds:g}{unit}", "middle"))
        parts.append(_tick(x(seconds), bottom, x(seconds), bottom + 4))
    for kind, one in (("theirs", reference), ("own", own)):
        if one is not None:
            parts += [f'<polyline class="{kind}" points="{line}"/>' for line in _lines(one.pitch, x, y)]
    parts.append(f'<line class="now" x1="{LEFT}" x2="{LEFT}" y1="{MEL_TOP}" y2="{bottom}"/></svg>')
    return "".join(parts)


def _lines(pitch: Floats, x: Callable[[float], float], y: Callable[[float], float]) -> list[str]:
    """Points of each voiced stretch; a frame alone is drawn as long as it lasts."""
    found: list[str] = []
    voiced = np.flatnonzero(~np.isnan(pitch))
    for run in np.split(voiced, np.flatnonzero(np.diff(voiced) > 1) + 1):
        if len(run):
            times = [(frame * HOP + HOP / 2) / SAMPLE_RATE for frame in run]
            points = list(zip(times, pitch[run].tolist(), strict=True))
            if len(points) == 1:
                ((time, hertz),) = points
                points = [(time - 0.5 / MEL_RATE, hertz), (time + 0.5 / MEL_RATE, hertz)]
            found.append(" ".join(f"{x(time):.1f},{y(hertz):.1f}" for time, hertz in points))
    return found


def _round_values(low: float, high: float, count: int) -> Sequence[float]:
    """About `count` round numbers within an interval."""
    rough = (high - low) / count
    power = 10 ** np.floor(np.log10(rough))
    step = float(next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough))
    return [round(number * step, 6) for number in range(int(np.ceil(low / step)), int(high / step) + 1)]


def _label(x: float, y: float, text: str, anchor: str, turned: bool = False) -> str:
    turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turned else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" dy=".35em" text-anchor="{anchor}"{turn}>{escape(text)}</text>'


def _tick(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="tick" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'

"""Pictures of a clip on one time axis, as SVG with the mel picture in it."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.pages.html import escape
from shards.mel import Filterbank, mel_filters
from shards.schema import HOP, MEL_RATE, SAMPLE_RATE

Floats = NDArray[np.float32]

COLOURS = ((7, 8, 28), (52, 16, 92), (126, 30, 108), (196, 55, 84), (238, 112, 62), (252, 184, 96), (253, 246, 206))
"""From quiet to loud, each lighter than the one before, so that the picture reads in grey as well."""
DARKEST = 2.0
"""Percentile of a clip's log-mels that is shown darkest; below it lies mostly the floor of digital silence."""
WIDTH, LEFT, RIGHT = 560, 54, 6
MEL_HEIGHT, CURVE_HEIGHT = 170, 96
_GAP, _FOOT = 14, 30


class Panels:
    """Panels below each other on one time axis; each method adds one."""

    def __init__(self, title: str, seconds: float) -> None:
        """`title` is for those who cannot see the picture; `seconds` is what the axis covers."""
        self.seconds = seconds
        self._title = title
        self._parts: list[str] = []
        self._top = 6.0
        self._bottom = 6.0

    def x(self, seconds: float) -> float:
        """Place of a time."""
        return LEFT + (WIDTH - LEFT - RIGHT) * seconds / self.seconds

    def _place(self, height: float, unit: str) -> float:
        """Top of a new panel, named at its left."""
        top = self._top
        self._bottom, self._top = top + height, top + height + _GAP
        self._parts.append(label(9, top + height / 2, unit, "middle", turned=True))
        return top

    def _box(self, kind: str, top: float, height: float) -> None:
        self._parts.append(
            f'<rect class="{kind}" x="{LEFT}" y="{top:g}" width="{WIDTH - LEFT - RIGHT}" height="{height:g}"/>'
        )

    def image(self, png: bytes, seconds: float, height: float, unit: str, exact: bool = False) -> float:
        """A picture whose width is `seconds`, with sharp pixels where `exact`; returns its top."""
        top = self._place(height, unit)
        self._box("pit", top, height)
        kind = "exact" if exact else "smooth"
        across = min(self.x(seconds) - LEFT, WIDTH - LEFT - RIGHT)
        self._parts.append(
            f'<image class="{kind}" x="{LEFT}" y="{top:g}" width="{across:.2f}" '
            f'height="{height:g}" preserveAspectRatio="none" '
            f'href="{data_uri(png, "image/png")}"/>'
        )
        return top

    def mel(self, mel: Floats, loudness: tuple[float, float], filterbank: Filterbank) -> None:
        """A log-mel [T, 80], its ln amplitudes from darkest to lightest."""
        top = self.image(mel_png(mel, loudness), len(mel) / MEL_RATE, MEL_HEIGHT, "kHz")
        for kilo in (0.5, 1, 2, 4, 8):
            share = (bin_of(1000 * kilo, filterbank) + 0.5) / mel.shape[1]
            y = top + MEL_HEIGHT * (1 - min(1, share))
            self._parts.append(label(LEFT - 6, y, f"{kilo:g}", "end") + _tick(LEFT - 4, y, LEFT, y))

    def curves(
        self, curves: Sequence[tuple[str, Floats]], limits: tuple[float, float], unit: str, height: float = CURVE_HEIGHT
    ) -> None:
        """Values per acoustic frame [T], NaN where there is none, each with the class that its line has."""
        top = self._place(height, unit)
        low, high = limits

        def y(value: float) -> float:
            return top + height * (1 - (value - low) / (high - low))

        self._box("frame", top, height)
        for value in round_values(low, high, 3):
            line = f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
            self._parts.append(label(LEFT - 6, y(value), f"{value:g}", "end") + line)
        for kind, values in curves:
            self._parts += [f'<polyline class="{kind}" points="{line}"/>' for line in _lines(values, self.x, y)]

    def waveform(self, samples: NDArray[np.int16], height: float = 56) -> None:
        """The lowest and highest sample of each of some hundred stretches, 16-bit PCM at 16 kHz [N]."""
        top = self._place(height, "sound")
        self._box("frame", top, height)
        columns = min(len(samples), WIDTH - LEFT - RIGHT)
        starts = np.linspace(0, len(samples), columns, endpoint=False).astype(int)
        scale = max(1, int(np.abs(samples.astype(np.int32)).max(initial=0)))
        xs = [self.x(start / SAMPLE_RATE) for start in starts.tolist()]
        edges = [
            (top + height / 2 * (1 - extreme / scale))
            for extreme in (np.maximum.reduceat(samples, starts), np.minimum.reduceat(samples, starts))
        ]
        there = [f"{x:.1f},{y:.1f}" for x, y in zip(xs, edges[0].tolist(), strict=True)]
        back = [f"{x:.1f},{y:.1f}" for x, y in zip(xs, edges[1].tolist(), strict=True)][::-1]
        self._parts.append(f'<polygon class="wave" points="{" ".join(there + back)}"/>')

    def svg(self) -> str:
        """The picture, with the time axis below all panels and the line that a player moves."""
        for seconds in round_values(0, self.seconds, 6):
            unit = " s" if seconds == 0 else ""
            x = self.x(seconds)
            tick = _tick(x, self._bottom, x, self._bottom + 4)
            self._parts.append(label(x, self._bottom + 16, f"{seconds:g}{unit}", "middle") + tick)
        return (
            f'<svg class="picture" viewBox="0 0 {WIDTH} {self._bottom + _FOOT:g}" role="img" '
            f'data-seconds="{self.seconds:.4f}" data-left="{LEFT}" data-wide="{WIDTH - LEFT - RIGHT}">'
            f"<title>{escape(self._title)}</title>{''.join(self._parts)}"
            f'<line class="now" x1="{LEFT}" x2="{LEFT}" y1="6" y2="{self._bottom:g}"/></svg>'
        )


def loudness_of(mels: Sequence[Floats]) -> tuple[float, float]:
    """Limits of the colours for mels that share them."""
    values = np.concatenate([mel.ravel() for mel in mels])
    low, high = float(np.percentile(values, DARKEST)), float(values.max())
    return low, max(high, low + 1)


def hertz_of(pitches: Sequence[Floats]) -> tuple[float, float]:
    """Limits of the axis for pitch curves that share it."""
    voiced = np.concatenate([pitch[~np.isnan(pitch)] for pitch in pitches])
    low, high = (float(voiced.min()), float(voiced.max())) if len(voiced) else (80.0, 240.0)
    margin = max(10.0, 0.08 * (high - low))
    return max(0.0, low - margin), high + margin


def mel_png(mel: Floats, loudness: tuple[float, float]) -> bytes:
    """A pixel per frame and bin, low frequencies at the bottom; PNG with a palette of `COLOURS`."""
    low, high = loudness
    grey = np.clip((mel.T[::-1] - low) / (high - low) * 255, 0, 255).round().astype(np.uint8)
    places = np.linspace(0, 255, len(COLOURS))
    palette = np.stack([np.interp(np.arange(256), places, channel) for channel in zip(*COLOURS, strict=True)], 1)
    return palette_png(grey, palette.round().astype(np.uint8))


def palette_png(indices: NDArray[np.uint8], palette: NDArray[np.uint8]) -> bytes:
    """PNG of indices [height, width] into colours [256, 3]."""
    from PIL import Image

    image = Image.fromarray(indices, "P")
    image.putpalette(palette.tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def data_uri(data: bytes, kind: str) -> str:
    """Bytes as an address that holds them; `kind` is their media type."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def bin_of(hertz: float, filterbank: Filterbank) -> float:
    """Place of a frequency among the 80 bins: 0 at the first one's centre."""
    filters = mel_filters(filterbank)
    bins = np.arange(filters.shape[1]) * (SAMPLE_RATE / 2) / (filters.shape[1] - 1)
    centres = (filters @ bins) / filters.sum(1)
    if hertz > centres[-1]:
        return float(len(centres) - 1 + (hertz - centres[-1]) / (centres[-1] - centres[-2]))
    return float(np.interp(hertz, centres, np.arange(len(centres))))


def _lines(values: Floats, x: Callable[[float], float], y: Callable[[float], float]) -> list[str]:
    """Points of each stretch of values; a frame alone is drawn as long as it lasts."""
    found: list[str] = []
    there = np.flatnonzero(~np.isnan(values))
    for run in np.split(there, np.flatnonzero(np.diff(there) > 1) + 1):
        if len(run):
            times = [(frame * HOP + HOP / 2) / SAMPLE_RATE for frame in run]
            points = list(zip(times, values[run].tolist(), strict=True))
            if len(points) == 1:
                ((time, value),) = points
                points = [(time - 0.5 / MEL_RATE, value), (time + 0.5 / MEL_RATE, value)]
            found.append(" ".join(f"{x(time):.1f},{y(value):.1f}" for time, value in points))
    return found


def round_values(low: float, high: float, count: int) -> Sequence[float]:
    """About `count` round numbers within an interval."""
    rough = (high - low) / count
    power = 10 ** np.floor(np.log10(rough))
    step = float(next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough))
    return [round(number * step, 6) for number in range(int(np.ceil(low / step)), int(high / step) + 1)]


def label(x: float, y: float, text: str, anchor: str, turned: bool = False) -> str:
    """Text in a picture, centred at `y`."""
    turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turned else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" dy=".35em" text-anchor="{anchor}"{turn}>{escape(text)}</text>'


def _tick(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="tick" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'

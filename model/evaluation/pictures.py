"""Mel picture and pitch curves of a sound, beside those of other systems."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.pages.draw import Panels, hertz_of, loudness_of
from shards.mel import Filterbank, log_mel
from shards.schema import SAMPLE_RATE

Floats = NDArray[np.float32]

SHORTEST = 1280
"""Samples that a sound is filled up to for its picture."""


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
    return Scales(
        max(one.seconds for one in tracks),
        loudness_of([one.mel for one in tracks]),
        hertz_of([one.pitch for one in tracks]),
        filterbank,
    )


def picture(name: str, own: Track, reference: Track | None, axes: Scales) -> str:
    """SVG: the mel above, the pitch below on the same seconds; the reference's pitch is dashed.

    Args:
        name: of the system, for those who cannot see the picture.
        reference: None where `own` is the reference.
    """
    panels = Panels(f"Mel spectrogram and pitch of {name}", axes.seconds)
    panels.mel(own.mel, axes.loudness, axes.filterbank)
    theirs = [("theirs", reference.pitch)] if reference is not None else []
    panels.curves([*theirs, ("own", own.pitch)], axes.hertz, "Hz")
    return panels.svg()

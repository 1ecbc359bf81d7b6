"""How well a mouth follows a sound: which of several faces speaks, and by how much sound and picture are apart.

A mouth moves when the sound changes. So the motion of the mouth, after the motion of the rest of the face was taken
out, is held against the spectral flux of the sound, both at 25 Hz. The opening of the lips by landmarks was tried too;
on faces of ordinary size the landmarks' jitter is as large as the movements of quiet speech.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import cv2
import numpy as np

from shards.schema import FACE_SIZE, SAMPLES_PER_FRAME

MAX_LAG = 5
"""Frames by which sound and picture may be apart when the speaker is chosen."""
WINDOW = 50
"""Frames in which nobody else may speak: a clip of two who take turns belongs to neither."""
STILL = 0.3
"""Grey levels (of 255): weaker motion counts for little, so that the noise of a still picture is no speech."""
QUIET = 1.0
"""dB per frame: a sound that changes less, such as steady noise, counts for little."""
BANDS_HZ = np.geomspace(150, 6000, 9)
"""Edges of the bands in which the sound's change is measured."""
RANGE_DB = 45
"""Levels further below the clip's loudest band are raised to this."""
_SMOOTH = 1.5
"""Standard deviation in frames of the Gaussian that both curves are smoothed with."""
_BLUR = 1.5
"""The same in pixels, of the face crops."""
_GRID = slice(28, 112), slice(20, 92)
_Y, _X = np.mgrid[_GRID].astype(np.float32)
_MOUTH = (_Y >= 76) & (_X >= 34) & (_X < 78)
_REST = ~_MOUTH & (_Y < 104)
_HALF = FACE_SIZE / 2


def mouth_motion(crops: np.ndarray) -> np.ndarray:
    """Mean change of the mouth region from frame to frame, in grey levels; float64 [F], 0 for the first frame.

    From each frame to the next an affine motion and a change of brightness are fitted to the rest of the face (least
    squares on the optical flow equation, Lucas and Kanade 1981) and taken out of the mouth region.

    Args:
        crops: uint8 [F, 112, 112, 3], faces aligned to the insightface template.
    """
    motion = np.zeros(len(crops))
    before: np.ndarray | None = None
    for number, crop in enumerate(crops):
        grey = cv2.GaussianBlur(cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY).astype(np.float32), (0, 0), _BLUR)[_GRID]
        if before is not None and not np.array_equal(grey, before):
            motion[number] = np.abs(_unexplained(before, grey)[_MOUTH]).mean()
        before = grey
    return motion


def _unexplained(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """What is left of the difference of two pictures when the motion of the face is taken out."""
    change, mean = after - before, (before + after) / 2
    down, across = np.gradient(mean)
    x, y = _X / _HALF - 1, _Y / _HALF - 1
    one = np.ones_like(mean)
    basis = np.stack([across, across * x, across * y, down, down * x, down * y, mean / 128, one], axis=-1)
    known = basis[_REST].astype(np.float64)
    # A flat picture has no gradient to fit; a little damping decides then.
    square = known.T @ known + 1e-3 * len(known) * np.eye(known.shape[1])
    weights = np.linalg.solve(square, known.T @ change[_REST])
    return change - basis @ weights


def spectral_flux(sound: np.ndarray, frames: int) -> np.ndarray:
    """Mean change of the sound's level over the bands, in dB per video frame; float64 [frames].

    Args:
        sound: float [N] at 16 kHz, sample 0 at video frame 0; shorter than the picture counts as silence.
    """
    size = 2 * SAMPLES_PER_FRAME
    padded = np.zeros(frames * SAMPLES_PER_FRAME + size)
    cut = sound[: frames * SAMPLES_PER_FRAME]
    margin = SAMPLES_PER_FRAME // 2
    padded[margin : margin + len(cut)] = cut
    windows = np.lib.stride_tricks.sliding_window_view(padded, size)[::SAMPLES_PER_FRAME][:frames]
    power = np.abs(np.fft.rfft(windows * np.hanning(size), axis=1)) ** 2
    edges = np.round(BANDS_HZ * size / 16_000).astype(int)
    bands = np.stack([power[:, low:high].sum(axis=1) for low, high in pairwise(edges)], axis=1)
    top = bands.max(initial=0.0)
    if top <= 0 or frames < 2:
        return np.zeros(frames)
    levels = 10 * np.log10(np.maximum(bands, top * 10 ** (-RANGE_DB / 10)))
    return np.abs(np.gradient(_smooth(levels, 0.7), axis=0)).mean(axis=1)


def _smooth(values: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian over time (first axis), ends repeated."""
    radius = int(3 * sigma + 1)
    weights = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    padded = np.pad(values, [(radius, radius)] + [(0, 0)] * (values.ndim - 1), mode="edge")
    return np.apply_along_axis(np.convolve, 0, padded, weights / weights.sum(), mode="valid")


def correlations(motion: np.ndarray, flux: np.ndarray, max_lag: int) -> np.ndarray:
    """Correlation of the two curves [F] for lags -max_lag ... max_lag of the sound behind the picture, in frames.

    Each lag uses the frames that both have; lags that leave fewer than half of the frames, or fewer than 8, are 0.
    `STILL` and `QUIET` are added in squares to the deviations, so that what hardly moves correlates with nothing.
    """
    motion, flux = _smooth(motion, _SMOOTH), _smooth(flux, _SMOOTH)
    count = len(motion)
    found = np.zeros(2 * max_lag + 1)
    for place, lag in enumerate(range(-max_lag, max_lag + 1)):
        if count - abs(lag) < max(8, count / 2):
            continue
        seen = motion[max(0, -lag) : count - max(0, lag)]
        heard = flux[max(0, lag) : count - max(0, -lag)]
        seen, heard = seen - seen.mean(), heard - heard.mean()
        found[place] = np.mean(seen * heard) / np.hypot(seen.std(), STILL) / np.hypot(heard.std(), QUIET)
    return found


def follows(motion: np.ndarray, flux: np.ndarray) -> float:
    """How well a mouth follows the sound: the largest correlation at lags up to `MAX_LAG`; about 0 for a still face."""
    return float(correlations(motion, flux, MAX_LAG).max())


@dataclass(frozen=True)
class Choice:
    """Who speaks.

    Attributes:
        scores: of each face over the whole clip.
        best: the face with the highest.
        margin: by how much it leads over the second.
        decided: whether that is enough, and nobody else leads as clearly in a part of the clip.
    """

    scores: tuple[float, ...]
    best: int
    margin: float
    decided: bool


def choose_speaker(motions: Sequence[np.ndarray], flux: np.ndarray, least: float, margin: float) -> Choice:
    """The face among two or more whose mouth follows the sound.

    Args:
        motions: `mouth_motion` of each face over the clip; 0 where it is away.
        flux: `spectral_flux` of the clip.
        least, margin: lowest score and lowest lead of a speaker.
    """
    scores, best, lead = _leader(motions, flux)
    decided = scores[best] >= least and lead >= margin
    last = max(len(flux) - WINDOW, 0)
    for begin in {*range(0, last, WINDOW // 2), last}:
        part = slice(begin, begin + WINDOW)
        scores_there, best_there, lead_there = _leader([motion[part] for motion in motions], flux[part])
        if best_there != best and scores_there[best_there] >= least and lead_there >= margin:
            decided = False
    return Choice(scores, best, lead, decided)


def _leader(motions: Sequence[np.ndarray], flux: np.ndarray) -> tuple[tuple[float, ...], int, float]:
    scores = tuple(follows(motion, flux) for motion in motions)
    second, first = np.argsort(scores, kind="stable")[-2:]
    return scores, int(first), scores[first] - scores[second]

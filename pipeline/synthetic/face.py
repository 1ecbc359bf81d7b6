"""A talking face: one frontal portrait, warped frame by frame to mouth shapes, head motion and blinks.

The portrait is NASA's photograph of Eileen Collins (public domain) that scikit-image ships as `data.astronaut()`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from pipeline.synthetic.visemes import GAP, LOWER_TEETH, PUCKER, TONGUE, TUCK, WIDTH
from shards.errors import UserError

# Positions in the portrait, pixels of the 512x512 image. Found with dlib's 68-point predictor on a four times enlarged
# copy; the inner lip contours, which the smile shows sharply, were then read off the enlargement.
_MOUTH = (223.4, 140.0)  # middle between the mouth corners
_CENTRE = (0.0, -24.0)  # middle of the picture, seen from the mouth
_TILT = 0.035  # radians by which the head leans
_HALF_WIDTH = 20.3  # from the middle of the mouth to a corner
_UPPER, _LOWER = 4.3, 10.6  # lower edge of the upper lip, upper edge of the lower lip, below the corners
_EYES = ((204.0, 102.0, 11.0), (247.0, 103.6, 11.0))  # x, y, half width
_LID, _LID_TRAVEL = 3.8, 6.6

_VIEW = 170.0  # portrait pixels that the picture spans
_OVERSAMPLE = 2
_LEFT, _TOP, _RIGHT, _BOTTOM = 90, 0, 360, 260  # the part of the portrait that can come into view
_MAX_GAP = 14.0  # pixels between the lips at opening 1
_REST_HALF = 19.0  # half width of the mouth at width 1
_SEAM, _CORNER = 5.4, 3.2  # where closed lips meet, and the corners without the smile
_REACH = 36.0  # how far to the side the mouth moves the cheeks
_ROI = (-50.0, -24.0, 50.0, 66.0)  # what the mouth can move: left, top, right, bottom, seen from the mouth


@dataclass(frozen=True)
class Look:
    """What makes one speaker look unlike another.

    Attributes:
        mirror: left and right exchanged.
        stretch: (horizontal, vertical) size of the face.
        jaw: widening of the lower face, -0.15 to 0.15.
        gain: factors for red, green and blue.
        gamma: below 1 brighter, above 1 darker.
    """

    mirror: bool = False
    stretch: tuple[float, float] = (1.0, 1.0)
    jaw: float = 0.0
    gain: tuple[float, float, float] = (1.0, 1.0, 1.0)
    gamma: float = 1.0


def smoothstep(x: np.ndarray, low: Any, high: Any) -> np.ndarray:
    """0 up to `low`, 1 from `high` on, a cubic between."""
    t = np.clip((x - low) / (high - low), 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


def render(mouths: np.ndarray, look: Look, rng: np.random.Generator, size: int) -> np.ndarray:
    """Frames of one clip.

    Args:
        mouths: float32 (F, 6), see `visemes.mouth_track`.
        look: the speaker's.
        rng: decides head motion and blinks.
        size: width and height of the picture in pixels.

    Returns:
        uint8 (F, size, size, 3), RGB.
    """
    import cv2

    portrait = _portrait(look)
    moves, blinks = _head_motion(len(mouths), rng), _blinks(len(mouths), rng)
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    grid_x, grid_y = np.meshgrid(axis * np.float32(_VIEW), axis * np.float32(_VIEW))
    frames = np.empty((len(mouths), size, size, 3), np.uint8)
    for f, mouth in enumerate(mouths):
        x, y = _to_face(grid_x, grid_y, moves[f], look)
        box = _window(x, y)
        colour, alpha = _move_mouth(x[box], y[box], mouth)
        cos, sin = np.cos(_TILT), np.sin(_TILT)
        source_x, source_y = _MOUTH[0] + cos * x - sin * y, _MOUTH[1] + sin * x + cos * y
        if blinks[f] > 0:
            _close_eyes(source_x, source_y, blinks[f])
        map_x = ((source_x - _LEFT + 0.5) * _OVERSAMPLE - 0.5).astype(np.float32)
        map_y = ((source_y - _TOP + 0.5) * _OVERSAMPLE - 0.5).astype(np.float32)
        frame = cv2.remap(portrait, map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
        patch = frame[box].astype(np.float32)
        tinted = colour * np.asarray(look.gain, np.float32)
        frame[box] = np.clip(patch + (tinted - patch) * alpha[..., None], 0, 255).astype(np.uint8)
        frames[f] = frame[:, ::-1] if look.mirror else frame
    return frames


@lru_cache(maxsize=16)
def _portrait(look: Look) -> np.ndarray:
    """The portrait's part in view, enlarged, in the speaker's colours; uint8 RGB."""
    import cv2

    image: Any = _load_portrait()[_TOP:_BOTTOM, _LEFT:_RIGHT].astype(np.float32)
    image = 255 * (np.clip(image, 0, 255) / 255) ** look.gamma * np.asarray(look.gain, np.float32)
    image = cv2.resize(image, None, fx=_OVERSAMPLE, fy=_OVERSAMPLE, interpolation=cv2.INTER_CUBIC)
    return np.clip(image, 0, 255).astype(np.uint8)


@lru_cache(maxsize=1)
def _load_portrait() -> np.ndarray:
    try:
        from skimage import data
    except ImportError:
        raise UserError("the synthetic face needs scikit-image's portrait: pip install scikit-image") from None
    return np.asarray(data.astronaut())


def _to_face(x: np.ndarray, y: np.ndarray, move: np.ndarray, look: Look) -> tuple[np.ndarray, np.ndarray]:
    """Picture coordinates (portrait pixels from the middle) to positions seen from the mouth in the portrait."""
    shift_x, shift_y, turn, grow = (float(v) for v in move)
    cos, sin = np.cos(turn) / grow, np.sin(turn) / grow
    u, v = x - shift_x, y - shift_y
    face_x = (cos * u + sin * v) / look.stretch[0] + _CENTRE[0]
    face_y = (cos * v - sin * u) / look.stretch[1] + _CENTRE[1]
    if look.jaw:
        lower = smoothstep(face_y, -30.0, 30.0) * (1 - smoothstep(np.abs(face_x), 30.0, 80.0))
        face_x = face_x * (1 - look.jaw * lower)
    return face_x.astype(np.float32), face_y.astype(np.float32)


def _window(x: np.ndarray, y: np.ndarray) -> tuple[slice, slice]:
    inside = (x > _ROI[0]) & (x < _ROI[2]) & (y > _ROI[1]) & (y < _ROI[3])
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def _move_mouth(x: np.ndarray, y: np.ndarray, mouth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Turn positions around the mouth (changed in place) into the portrait positions that show there.

    Above the line of the upper lip the picture comes from above the portrait's smile, below the lower lip's line from
    below it; what lies between is drawn.

    Returns:
        Colour (h, w, 3) and opacity (h, w) of the inside of the mouth.
    """
    gap = _MAX_GAP * float(mouth[GAP])
    half = _REST_HALF * float(mouth[WIDTH])
    pucker, tuck = float(mouth[PUCKER]), float(mouth[TUCK])
    t = x / half
    arc = np.maximum(0.0, 1 - t * t)
    if mouth[WIDTH] < 0.8:
        arc = arc ** (0.6 + 0.5 * float(mouth[WIDTH]))  # rounded lips open in an oval
    corner = _CORNER + 0.22 * gap
    upper = corner + (_SEAM - _CORNER - 0.34 * gap - 0.8 * tuck) * arc
    lower = upper + gap * arc
    colour, alpha = _inside(x, y, t, arc, upper, lower, mouth)

    # Sideways: corners go from the portrait's smile to this width; the cheeks give way.
    side = np.abs(x)
    ramp = np.where(side < half, side / half, np.clip((_REACH - side) / (_REACH - half), 0, 1))
    tall = smoothstep(y, -10.0, 0.0) * (1 - smoothstep(y, 18.0, 34.0))
    source_x = x + np.sign(x) * (_HALF_WIDTH - half) * ramp * tall

    smile = np.maximum(0.0, 1 - (source_x / _HALF_WIDTH) ** 2)
    fade = 1 - smoothstep(side, half, _REACH + 4.0)
    above = (_UPPER * smile - upper) * fade * (1 - smoothstep(-y, -upper + 2.0, 11.0 + 0 * y))
    rise = upper - y
    above += 0.3 * pucker * rise * (1 - smoothstep(rise, 2.0, 9.0)) * fade
    jaw = -0.5 * gap * (1 - smoothstep(side, 16.0, 44.0)) * (1 - smoothstep(y, 42.0 + 0 * y, 64.0))
    chin = smoothstep(y, lower + 5.0, 34.0 + 0 * y)
    below = (_LOWER * smile - lower) * fade * (1 - chin) + jaw * chin
    drop = y - lower
    below += (0.9 * tuck - 0.3 * pucker) * drop * (1 - smoothstep(drop, 2.0, 9.0)) * fade
    middle = 0.5 * (upper + lower)
    y += np.where(y < middle, above, below)
    x[...] = source_x
    return colour, alpha


def _inside(
    x: np.ndarray,
    y: np.ndarray,
    t: np.ndarray,
    arc: np.ndarray,
    upper: np.ndarray,
    lower: np.ndarray,
    mouth: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Teeth and tongue before a dark ground."""

    def cover(distance: np.ndarray) -> np.ndarray:
        return np.clip(distance + 0.5, 0.0, 1.0)

    def lay(base: np.ndarray, top: np.ndarray, opacity: np.ndarray) -> np.ndarray:
        return base + (top - base) * opacity[..., None]

    depth = smoothstep(lower - y, 0.0, 12.0)[..., None]
    colour = np.asarray([62, 22, 24], np.float32) * (1 - 0.45 * depth)
    light = (1 - 0.5 * np.minimum(t * t, 1))[..., None]
    groove = (1 - 0.16 * smoothstep(np.abs(np.sin(x * (np.pi / 4.4))), 0.86, 1.0))[..., None]
    enamel = np.asarray([232, 222, 208], np.float32) * light
    colour = lay(colour, enamel * groove, cover(9.4 - 3.0 * t * t - y) * cover(1.05 - np.abs(t)))
    rows = float(mouth[LOWER_TEETH])
    if rows > 0.05:
        colour = lay(colour, enamel * groove * 0.92, cover(y - lower + 4.5 * rows * arc))
    tongue = float(mouth[TONGUE])
    if tongue > 0.05:
        height = tongue * 0.9 * (lower - upper) * np.maximum(0.0, 1 - (t / 0.72) ** 2)
        colour = lay(colour, np.asarray([196, 98, 98], np.float32) * light, cover(y - lower + height))
    shade = 0.55 + 0.45 * smoothstep(y - upper, -0.5, 2.5)  # the upper lip's shadow
    alpha = cover(y - upper) * cover(lower - y) * cover((1 - np.abs(t)) * 6)
    return colour * shade[..., None], alpha


def _close_eyes(x: np.ndarray, y: np.ndarray, closed: float) -> None:
    """Pull the upper lids down over the eyes (positions in the portrait, `y` changed in place)."""
    for eye_x, eye_y, half in _EYES:
        rows = slice(*np.searchsorted(y.mean(1), (eye_y - 24, eye_y + 14)))
        t = (x[rows] - eye_x) / half
        arc = np.maximum(0.0, 1 - t * t)
        edge = eye_y + 1.0 - (_LID + 1.0) * arc
        travel = closed * _LID_TRAVEL * arc
        lid = edge + travel
        height = y[rows] - (eye_y - 10)
        pull = np.clip(height / np.maximum(lid - (eye_y - 10), 1.0), 0, 1)
        y[rows] -= np.where(y[rows] < lid, travel * pull, 0)


def _head_motion(frames: int, rng: np.random.Generator) -> np.ndarray:
    """(F, 4): shift right and down in portrait pixels, turn in radians, growth factor; slow sums of sines."""
    time = np.arange(frames) / 25
    reach = np.asarray([2.5, 1.8, 0.03, 0.015])
    offset = rng.uniform(-1, 1, 4) * np.asarray([3.0, 3.0, 0.03, 0.03])
    rate, phase = rng.uniform(0.15, 0.6, (4, 2)), rng.uniform(0, 2 * np.pi, (4, 2))
    waves = np.sin(2 * np.pi * rate * time[:, None, None] + phase).mean(-1)
    return waves * reach + offset + np.asarray([0, 0, 0, 1.0])


def _blinks(frames: int, rng: np.random.Generator) -> np.ndarray:
    """(F,) how far the eyes are closed, 0 to 1; a blink takes six frames."""
    closed = np.zeros(frames + 6)
    at = int(rng.integers(4, 60))
    while at < frames:
        closed[at : at + 6] = [0.4, 0.9, 1.0, 0.8, 0.45, 0.15]
        at += int(rng.integers(30, 90))
    return closed[:frames]

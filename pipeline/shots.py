"""Shot changes: where one take ends and the next begins, found while frames stream by.

A hard cut is a spike of the difference between neighbouring frames. How high a spike must be follows from its
surroundings, as in the sliding windows of Yeo and Liu, "Rapid scene analysis on compressed video" (1995), here against
the running median; the difference joins colour histograms (Zhang, Kankanhalli and Smoliar, "Automatic partitioning of
full-motion video", 1993), which do not see motion, with small pictures, which see shots of like colours. Fast motion
raises the median with it. A flash is a spike too, but what comes after it looks like what was before.

Crossfades and fades have no spike and give no cut.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

SIZE = (64, 36)
"""Width and height of the small pictures."""
_SAMPLED = (192, 108)
"""Nine pixels of a frame make one of the small picture; the mean of all costs a tenth of a detector's time."""
BINS = 8
"""Histogram bins per colour channel."""
AROUND = 12
"""Frames on each side that the median is taken of."""
FLASH = 6
"""Frames on each side that are compared across a spike; a shorter flash, or insert, is no cut."""
RATIO = 2.0
"""A spike is at least this many times the median."""


@dataclass(frozen=True)
class _Look:
    """A frame at a glance: small picture float32 [36, 64, 3] in 0..1 and colour histogram [512] of sum 1."""

    small: np.ndarray
    colours: np.ndarray

    def difference(self, other: _Look) -> float:
        """0 for equal frames, 1 for black against white."""
        picture = float(np.abs(self.small - other.small).mean())
        colours = float(np.abs(self.colours - other.colours).sum()) / 2
        return (picture + colours) / 2


class ShotFinder:
    """Takes frames one by one and finds the first frames of shots.

    Memory does not grow but for one number per frame.

    Args:
        threshold: by how much the difference across a cut, 0 to 1, exceeds that of its surroundings. Frames of talking
            heads differ by less than 0.05, shots of one studio by 0.2 and more.
    """

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._last: np.ndarray | None = None
        self._looks: deque[_Look] = deque(maxlen=2 * FLASH)
        self._differences: list[float] = []
        self._spikes: dict[int, float] = {}

    def add(self, frame: np.ndarray) -> None:
        """Take the next frame, RGB uint8 [H, W, 3]."""
        # A frame shown twice says nothing about motion.
        if frame is self._last:
            self._differences.append(np.nan)
            self._looks.append(self._looks[-1])
        else:
            look = _look(frame)
            self._differences.append(look.difference(self._looks[-1]) if self._looks else np.nan)
            self._looks.append(look)
        self._last = frame
        spike = len(self._differences) - FLASH
        if spike > 0:
            self._compare(spike, FLASH)

    def finish(self) -> list[int]:
        """Numbers of the frames, 0 not among them, that begin a shot, in rising order. No frame may follow."""
        for ahead in range(FLASH - 1, 0, -1):
            if len(self._differences) > ahead:
                self._compare(len(self._differences) - ahead, ahead)
        differences = np.array(self._differences)
        return [number for number in self._spikes if self._is_cut(number, differences)]

    def _compare(self, spike: int, ahead: int) -> None:
        """Note frame `spike`, `ahead` frames before the end, where all frames before it differ from all after."""
        if not self._differences[spike] > self._threshold:
            return
        looks = list(self._looks)
        before, after = looks[: len(looks) - ahead][-FLASH:], looks[len(looks) - ahead :]
        least = min(one.difference(other) for one in before for other in after)
        if least > self._threshold:
            self._spikes[spike] = self._differences[spike]

    def _is_cut(self, number: int, differences: np.ndarray) -> bool:
        around = np.delete(differences[max(number - AROUND, 1) : number + AROUND + 1], min(number - 1, AROUND))
        around = around[np.isfinite(around)]
        usual = float(np.median(around)) if len(around) else 0.0
        return self._spikes[number] > max(RATIO * usual, usual + self._threshold)


def _look(frame: np.ndarray) -> _Look:
    import cv2

    if frame.shape[0] > _SAMPLED[1] and frame.shape[1] > _SAMPLED[0]:
        frame = cv2.resize(frame, _SAMPLED, interpolation=cv2.INTER_NEAREST)
    small = cv2.resize(frame, SIZE, interpolation=cv2.INTER_AREA)
    places = (small // (256 // BINS)).astype(np.int64) @ np.array([BINS * BINS, BINS, 1])
    colours = np.bincount(places.ravel(), minlength=BINS**3) / places.size
    return _Look(small.astype(np.float32) / 255, colours.astype(np.float32))

"""Frames of a clip that are wanted more than once, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

KEPT_BYTES = 512 << 20
"""Frames of a clip are kept up to this size: 3,500 of LRS3's, 7.5 s of 720p."""


class Frames:
    """Iterates over frames as often as one likes.

    The first pass keeps them while they fit; later passes yield what was kept, or decode again where it was too much.

    Args:
        decode: gives the frames, uint8 arrays; the same array again for a frame that is shown again.
        limit: bytes.
    """

    def __init__(self, decode: Callable[[], Iterator[np.ndarray]], limit: int = KEPT_BYTES) -> None:
        self._decode = decode
        self._limit = limit
        self._kept: list[np.ndarray] | None = None

    def __iter__(self) -> Iterator[np.ndarray]:
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[np.ndarray] = []
        held = 0
        for frame in self._decode():
            if held <= self._limit:
                held += 0 if kept and kept[-1] is frame else frame.nbytes
                kept.append(frame)
            if held > self._limit:
                kept.clear()
            yield frame
        if held <= self._limit:
            self._kept = kept

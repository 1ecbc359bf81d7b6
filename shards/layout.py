"""How a batch lies in one piece of memory, so that other processes can fill it and nobody copies it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from shards.augment import CROP
from shards.schema import LIP_SIZE, MEL_BINS, MEL_PER_FRAME, SAMPLES_PER_FRAME

SampleField = Literal["lips", "identity", "expression", "units", "timbre", "pitch", "energy", "mel", "wav"]
"""Fields that a sample may hold."""
NEEDED: tuple[SampleField, ...] = ("lips", "identity", "expression", "units", "timbre", "pitch", "energy", "mel")
"""Those of a sample that trains the network which reads lips."""
ALIGN = 64
IGNORE = -100
"""Unit index in padding: the loss skips it."""


class Layout:
    """Arrays of a batch of `rows` samples of `frames` video frames each.

    Args:
        widths: named widths (`D_identity` ...) of the values.
        lips_done: whether the worker augments.
        fields: what a sample holds.

    Attributes:
        bytes: of memory that they take.

    The arrays of all fields, with B rows, F frames and T = 2F:
        lips: uint8 [B, F, 96, 96], or float32 [B, F, 88, 88] where the worker augments.
        crop, flip, box, shown: int64 [B, 2], bool [B], int64 [B, 4], bool [B, F]: the lips' augmentation; only with
            them.
        identity, expression: float16 [B, F, D].
        units: int64 [B, T], -100 in padding.
        timbre: float32 [B, D].
        pitch, energy: float32 [B, T].
        mel: float32 [B, T, 80].
        wav: int16 [B, 640F].
        frames, start: int64 [B], the valid length and where the crop begins, in video frames.
    """

    def __init__(
        self, rows: int, frames: int, widths: Mapping[str, int], lips_done: bool, fields: tuple[str, ...] = NEEDED
    ) -> None:
        sound = MEL_PER_FRAME * frames
        lips = ("f4", (rows, frames, CROP, CROP)) if lips_done else ("u1", (rows, frames, LIP_SIZE, LIP_SIZE))
        arrays: dict[str, tuple[str, tuple[int, ...]]] = {
            "lips": lips,
            "identity": ("f2", (rows, frames, widths.get("D_identity", 0))),
            "expression": ("f2", (rows, frames, widths.get("D_expression", 0))),
            "mel": ("f4", (rows, sound, MEL_BINS)),
            "wav": ("i2", (rows, SAMPLES_PER_FRAME * frames)),
            "units": ("i8", (rows, sound)),
            "pitch": ("f4", (rows, sound)),
            "energy": ("f4", (rows, sound)),
            "timbre": ("f4", (rows, widths.get("D_timbre", 0))),
            "frames": ("i8", (rows,)),
            "start": ("i8", (rows,)),
            "crop": ("i8", (rows, 2)),
            "flip": ("?", (rows,)),
            "box": ("i8", (rows, 4)),
            "shown": ("?", (rows, frames)),
        }
        wanted = {*fields, "frames", "start", *(("crop", "flip", "box", "shown") if "lips" in fields else ())}
        self._arrays = {name: array for name, array in arrays.items() if name in wanted}
        self._offsets: dict[str, int] = {}
        self.bytes = 0
        for name, (dtype, shape) in self._arrays.items():
            self._offsets[name] = self.bytes
            size = np.dtype(dtype).itemsize * int(np.prod(shape))
            self.bytes += size + -size % ALIGN

    def views(self, memory: NDArray[np.uint8]) -> dict[str, NDArray[np.generic]]:
        """The arrays inside `memory`, uint8 of at least `bytes`."""
        found: dict[str, NDArray[np.generic]] = {}
        for name, (dtype, shape) in self._arrays.items():
            begin = self._offsets[name]
            end = begin + np.dtype(dtype).itemsize * int(np.prod(shape))
            found[name] = memory[begin:end].view(dtype).reshape(shape)
        return found


@lru_cache(maxsize=64)
def layout(
    rows: int, frames: int, widths: tuple[tuple[str, int], ...], lips_done: bool, fields: tuple[str, ...] = NEEDED
) -> Layout:
    """The `Layout` of these sizes; `widths` as pairs."""
    return Layout(rows, frames, dict(widths), lips_done, fields)

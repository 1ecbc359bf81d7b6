"""A pickle's tree of tables and tensors, without running anything that is in it.

A pickle may call any function. Here torch's storages and rebuilders become records, ordered tables become dicts, and
every other class or function an empty stub.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import IO, Any, ClassVar, NamedTuple

import torch

from pipeline.networks.torchscript import TYPES


class Storage(NamedTuple):
    """A row of numbers in the file: `length` of them from `start` on."""

    key: str
    dtype: torch.dtype
    start: int
    length: int


# What a pickle can get hold of. It may call these, and set their state or items, so none does anything.


class _Stub:
    """An object of a class, or the result of a function, that is not looked at."""

    def __init__(self, *_: object, **__: object) -> None:
        return

    def __call__(self, *_: object, **__: object) -> _Stub:
        return self

    def __setstate__(self, _: object) -> None:
        return

    def __setitem__(self, *_: object) -> None:
        return

    def append(self, _: object) -> None:
        return


class _Table(dict[Any, Any]):
    """An ordered dict, without the attributes that the file may give it."""

    def __setstate__(self, _: object) -> None:
        return


class Record:
    """A tensor as the file states it, not yet checked or read."""

    def __init__(self, storage: object, offset: object, size: object, stride: object, *_: object) -> None:
        self.storage, self.offset, self.size, self.stride = storage, offset, size, stride

    def __setstate__(self, _: object) -> None:
        return


class _Parameter:
    """Called with a tensor's record, gives just that."""

    def __new__(cls, data: Any, *_: object) -> Any:
        return data

    def __setstate__(self, _: object) -> None:
        return


_KNOWN: dict[tuple[str, str], type] = {
    ("collections", "OrderedDict"): _Table,
    ("torch._utils", "_rebuild_tensor"): Record,
    ("torch._utils", "_rebuild_tensor_v2"): Record,
    ("torch._utils", "_rebuild_parameter"): _Parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _Parameter,
}

# Python's own class: the compiled one sets aside as much memory as a forged number in the file asks for.
_Unpickler: Any = pickle._Unpickler


class Reader(_Unpickler):
    """The unpickler.

    Attributes:
        storages: the types of numbers of the storages that the pickle named, by their keys.

    Raises:
        pickle.UnpicklingError: a storage of no size, or what no file of torch has; a damaged pickle may raise anything.
    """

    dispatch: ClassVar[dict[int, Callable[..., Any]]] = dict(_Unpickler.dispatch)

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__(stream, encoding="latin-1")
        self.storages: dict[str, torch.dtype] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in TYPES:
            return TYPES[name]
        return _KNOWN.get((module, name), _Stub)

    def persistent_load(self, pid: Any) -> Any:
        """torch's reference to a storage: ("storage", type, key, device, length), before 1.6 with a view of it."""
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or not isinstance(pid[1], torch.dtype):
            return _Stub()
        _, dtype, key, _, length, *view = pid
        start = 0
        if view and view[0] is not None:
            _, start, length = view[0]
        if not (is_size(start) and is_size(length)):
            raise pickle.UnpicklingError("a storage of no size")
        self.storages[str(key)] = dtype
        return Storage(str(key), dtype, start, length)

    def get_extension(self, code: int) -> None:
        raise pickle.UnpicklingError("an extension code")

    def load_bytearray8(self) -> None:
        # Filled before it is read, at whatever length is stated. torch's protocol 2 has none.
        raise pickle.UnpicklingError("a bytearray")


Reader.dispatch[pickle.BYTEARRAY8[0]] = Reader.load_bytearray8


def is_size(number: object) -> bool:
    """Whether this can be a length or an offset."""
    return isinstance(number, int) and number >= 0

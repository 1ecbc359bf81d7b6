"""The tensors of a TorchScript archive, without torch's own loader: that one runs what the archive's classes define.

The archive is a zip file with a pickle `data.pkl` of the modules, whose tensors lie beside it in `data/`.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from io import BytesIO
from typing import Any

import torch
from torch import Tensor

TYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
"""Names of torch's storages in a pickle, and what numbers they hold."""


class _Module:
    """A scripted module: its attributes by name."""

    def __init__(self, *_: object) -> None:
        self.state: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise pickle.UnpicklingError("a module whose state is no table")
        self.state = state


class _Reader(pickle.Unpickler):
    """Knows tensors, ordered tables and modules without methods, and nothing else that a pickle may call."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(BytesIO(archive.read(f"{root}data.pkl")))
        self._archive, self._root = archive, root
        self._flat: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in TYPES:
            return TYPES[name]
        if module == "torch.jit._pickle" and name.startswith(("build_", "restore_type_tag")):
            return lambda value, *_: value
        if module.split(".")[0] == "__torch__":
            return _Module
        raise pickle.UnpicklingError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, _, _ = pid
        if key not in self._flat:
            data = bytearray(self._archive.read(f"{self._root}data/{key}"))
            self._flat[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return self._flat[key]


def _rebuild(flat: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> Tensor:
    return flat.as_strided(size, stride, offset).clone()


def read_archive(archive: zipfile.ZipFile) -> dict[str, Tensor]:
    """Tensors by name, as in the module's `state_dict`.

    Raises:
        pickle.UnpicklingError, KeyError, ...: the archive is damaged or holds other things than modules and tensors.
    """
    path = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
    found: dict[str, Tensor] = {}
    _collect(_Reader(archive, path.removesuffix("data.pkl")).load(), "", found, ())
    return found


def _collect(module: Any, prefix: str, found: dict[str, Tensor], above: tuple[int, ...]) -> None:
    if not isinstance(module, _Module) or id(module) in above:
        raise pickle.UnpicklingError("no tree of modules")
    for name, value in module.state.items():
        if isinstance(value, Tensor):
            found[f"{prefix}{name}"] = value
        elif isinstance(value, _Module):
            _collect(value, f"{prefix}{name}.", found, (*above, id(module)))

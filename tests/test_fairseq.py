"""Checkpoints of fairseq: their tensors come out, nothing in them runs, and damage is one clear error."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import resource
import struct
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.fairseq import MAGIC, PROTOCOL, read_checkpoint
from shards.errors import UserError

FORMATS = pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def save(tree: Any, path: Path, new: bool = True) -> None:
    torch.save(tree, path, _use_new_zipfile_serialization=new)


def refuse(path: Path, match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        read_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def fairseq() -> Iterator[types.ModuleType]:
    """Packages that fairseq's checkpoints name; gone again before the file is read."""
    names = ("fairseq", "fairseq.data", "fairseq.data.dictionary", "omegaconf", "omegaconf.dictconfig")
    assert not any(name in sys.modules for name in names)
    for name in names:
        sys.modules[name] = types.ModuleType(name)
    module = sys.modules["fairseq.data.dictionary"]
    module.Dictionary = type("Dictionary", (), {"__module__": module.__name__})  # type: ignore[attr-defined]
    config = sys.modules["omegaconf.dictconfig"]
    config.DictConfig = type("DictConfig", (dict,), {"__module__": config.__name__})  # type: ignore[attr-defined]
    yield module
    for name in names:
        sys.modules.pop(name, None)


def forget() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in ("fairseq", "omegaconf")]:
        del sys.modules[name]


@FORMATS
def test_tensors_of_every_kind_come_out_as_torch_stored_them(tmp_path: Path, new: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 8, generator=generator)
    model = OrderedDict(torch.nn.Linear(3, 4).state_dict())
    model["view"] = base[1:4, 2:7:2]
    model["transposed"] = base.T
    model["whole"] = base
    model["parameter"] = torch.nn.Parameter(torch.randn(2, 2, generator=generator))
    model["empty"] = torch.empty(0, 3)
    model["scalar"] = torch.tensor(2.5)
    model["double"] = torch.randn(3, generator=generator, dtype=torch.float64)
    model["half"] = torch.randn(5, generator=generator).half()
    model["bfloat16"] = torch.randn(5, generator=generator).bfloat16()
    for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool):
        model[str(dtype)] = torch.tensor([0, 1, 1]).to(dtype)
    save({"args": None, "model": model, "extra_state": {"epoch": 3}}, tmp_path / "c.pt", new)
    found = read_checkpoint(tmp_path / "c.pt")
    assert list(found) == list(model)
    for key, value in model.items():
        expected = value.detach().float() if value.is_floating_point() else value
        assert found[key].dtype == expected.dtype, key
        assert torch.equal(found[key], expected), key
        assert found[key].is_contiguous()
        assert not found[key].requires_grad


@FORMATS
def test_objects_of_absent_packages_are_passed_over(tmp_path: Path, fairseq: Any, new: bool) -> None:
    dictionary = fairseq.Dictionary()
    dictionary.symbols, dictionary.indices = ["<s>", "a"], {"<s>": 0, "a": 1}
    config = sys.modules["omegaconf.dictconfig"].DictConfig(task={"labels": ["wrd"]})
    model = OrderedDict(w=torch.arange(3.0))
    tree = {"cfg": config, "model": model, "task_state": {"dictionaries": [dictionary]}, "last_optimizer_state": None}
    save(tree, tmp_path / "c.pt", new)
    forget()
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "c.pt", weights_only=True)
    assert torch.equal(read_checkpoint(tmp_path / "c.pt")["w"], torch.arange(3.0))


@FORMATS
def test_nothing_in_the_file_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new: bool) -> None:
    monkeypatch.chdir(tmp_path)
    evil = [
        Call(os.system, "touch ran"),
        Call(eval, "open('ran', 'w')"),
        Call(builtins.exec, "open('ran', 'w')"),
        Call(getattr, Call(__import__, "os"), "system"),
        Call(open, "ran", "w"),
        Call(torch.hub.load_state_dict_from_url, "http://127.0.0.1:9/ran"),
        Call(torch.load, "ran"),
        Call(torch.save, 1, "ran"),
        Call(torch.serialization.add_safe_globals, [os.system]),
        Call(pickle.loads, pickle.dumps(Call(os.system, "touch ran"))),
        Call(torch._utils._rebuild_device_tensor_from_numpy, Call(os.system, "touch ran"), None, "cpu", False),
    ]
    hooked = Call(
        torch._utils._rebuild_parameter, torch.zeros(1), False, OrderedDict({0: Call(os.system, "touch ran")})
    )
    model = OrderedDict(w=torch.arange(3.0), hooked=hooked, other=evil[0])
    save({"cfg": evil, "task_state": {"x": evil}, "model": model, evil[0]: 1}, tmp_path / "c.pt", new)
    found = read_checkpoint(tmp_path / "c.pt")
    assert list(found) == ["w", "hooked"]
    assert torch.equal(found["w"], torch.arange(3.0))
    assert os.listdir(tmp_path) == ["c.pt"]


def hostile(code: bytes) -> bytes:
    return pickle.dumps(MAGIC, 2) + pickle.dumps(PROTOCOL, 2) + pickle.dumps({"little_endian": True}, 2) + code


def test_a_pickle_cannot_change_what_reads_it(tmp_path: Path) -> None:
    """State set on the reader's own classes, and classes made of strange parts."""
    path = tmp_path / "c.pt"
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n"
    for target in (
        rebuild,
        b"ccollections\nOrderedDict\n",
        b"cfairseq\nX\n",
        b"ctorch\nFloatStorage\n",
        b"]",
        b"}",
        b"(",
    ):
        for state in (b"}S'__init__'\nNs", b"N}S'__init__'\nNs\x86"):
            path.write_bytes(hostile(b"\x80\x02" + target + state + b"b."))
            refuse(path, "damaged")
    # An ordered table that is given its own `items` and class.
    code = b"\x80\x02ccollections\nOrderedDict\n)RN}(S'items'\ncos\nsystem\nS'__class__'\ncos\nsystem\nu\x86b."
    path.write_bytes(hostile(code) + pickle.dumps([], 2))
    refuse(path, "no tensors by name")
    save({"model": {"w": torch.ones(2)}}, path)
    assert torch.equal(read_checkpoint(path)["w"], torch.ones(2))


def test_forged_lengths_in_the_pickle_take_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    path.write_bytes(hostile(b"\x80\x05\x96" + struct.pack("<Q", 5) + b"hello."))
    refuse(path, "a bytearray")
    for code in (b"\x8e" + struct.pack("<Q", 1 << 40), b"Nr\xff\xff\xff\xff0", b"\x95" + struct.pack("<Q", 1 << 40)):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        path.write_bytes(hostile(b"\x80\x04" + code))
        refuse(path, "damaged")
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB


@pytest.mark.parametrize(
    ("storage", "offset", "shape", "stride", "match"),
    [
        (4, 0, (1 << 40,), (0,), "larger than what is stored"),
        (4, 0, (3, 3), (1, 1), "larger than what is stored"),
        (4, 2, (3,), (1,), "larger than what is stored"),
        (1 << 60, 0, (1 << 60,), (1,), "more than twice"),
        (4, -1, (2,), (1,), "no proper shape"),
        (4, 0, (-1, -4), (1, 1), "no proper shape"),
        (4, 0, (2,), (1, 1), "no proper shape"),
        (4, 0, [4], [1], "no proper shape"),
        (4, 0, (2.0,), (1,), "no proper shape"),
        (-4, 0, (2,), (1,), "no size"),
        (64, 0, (64,), (1,), "ends behind"),
    ],
)
@FORMATS
def test_forged_shapes_are_refused(
    tmp_path: Path, new: bool, storage: int, offset: int, shape: Any, stride: Any, match: str
) -> None:
    class Forged:
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, (Storage(), offset, shape, stride, False, OrderedDict())

    class Storage:
        pass

    class Writer(pickle._Pickler):  # type: ignore[name-defined, misc]
        def persistent_id(self, value: object) -> Any:
            pid = ("storage", torch.FloatStorage, "0", "cpu", storage)
            return (pid if new else (*pid, None)) if isinstance(value, Storage) else None

    stream = io.BytesIO()
    Writer(stream, 2).dump({"model": {"w": Forged()}})
    path = tmp_path / "c.pt"
    if new:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("c/data.pkl", stream.getvalue())
            archive.writestr("c/data/0", bytes(16))
    else:
        path.write_bytes(hostile(stream.getvalue()) + pickle.dumps(["0"], 2) + struct.pack("<q", 4) + bytes(16))
    refuse(path, match)


def test_sharing_beyond_reason_is_refused(tmp_path: Path) -> None:
    base = torch.randn(50_000)
    save({"model": {str(number): base for number in range(100)}}, tmp_path / "c.pt")
    refuse(tmp_path / "c.pt", "more than twice")
    save({"model": {"a": base, "b": base}}, tmp_path / "c.pt")
    assert torch.equal(read_checkpoint(tmp_path / "c.pt")["b"], base)


@FORMATS
@given(share=st.floats(0, 1, exclude_max=True))
@settings(max_examples=20, deadline=None)
def test_cut_files_are_refused(tmp_path_factory: pytest.TempPathFactory, new: bool, share: float) -> None:
    path = tmp_path_factory.getbasetemp() / f"cut-{new}.pt"
    save({"model": OrderedDict(torch.nn.Linear(7, 9).state_dict())}, path, new)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    refuse(path, "cut short|no file that torch.save wrote")


@FORMATS
@given(place=st.integers(0), byte=st.integers(0, 255))
@settings(max_examples=40, deadline=None)
def test_changed_bytes_are_an_error_or_numbers(
    tmp_path_factory: pytest.TempPathFactory, new: bool, place: int, byte: int
) -> None:
    path = tmp_path_factory.getbasetemp() / f"changed-{new}.pt"
    save({"cfg": Call(os.getpid), "model": OrderedDict(torch.nn.Linear(7, 9).state_dict())}, path, new)
    data = bytearray(path.read_bytes())
    data[place % len(data)] = byte
    path.write_bytes(data)
    try:
        found = read_checkpoint(path)
    except UserError:
        return
    assert all(isinstance(value, torch.Tensor) for value in found.values())


def test_damaged_numbers_are_noticed(tmp_path: Path) -> None:
    save({"model": {"w": torch.full((1000,), 1.5)}}, tmp_path / "c.pt")
    data = bytearray((tmp_path / "c.pt").read_bytes())
    data[data.index(struct.pack("<4f", *[1.5] * 4)) + 100] ^= 1
    (tmp_path / "c.pt").write_bytes(data)
    refuse(tmp_path / "c.pt", "damaged.*CRC")


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    path.write_bytes(b"")
    refuse(path, "empty")
    path.write_text("<html>404</html>")
    refuse(path, r"begins with b'<html>404")
    path.write_bytes(pickle.dumps({"model": 1}))
    refuse(path, "torch.save did not write")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "x")
    refuse(path, "torch.save did not write")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("c/data.pkl", pickle.dumps({}))
    refuse(path, "compressed")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("c/data.pkl", pickle.dumps({}))
        archive.writestr("c/byteorder", "big")
    refuse(path, "big-endian")
    for tree in ({"cfg": 1, "args": None}, {"model": 3}, {"model": {}}, {}):
        save(tree, path)
        refuse(path, "no tensors by name")
    save({"cfg": 1, "args": None}, path)
    refuse(path, "it holds cfg, args")
    save([torch.zeros(1)], path)
    refuse(path, "no table of tensors")
    save({"model": {"w": torch.eye(2).to_sparse()}}, path)
    refuse(path, "no tensors by name")
    with pytest.raises(UserError, match="cannot be read"):
        read_checkpoint(tmp_path)

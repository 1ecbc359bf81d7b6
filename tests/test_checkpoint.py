"""Checkpoints on disk and in a bucket: whole or not there, pruned, and nothing in a file is run or trusted unread."""

from __future__ import annotations

import io
import os
import resource
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from model import checkpoint
from model.checkpoint import Checkpoint
from shards.errors import UserError
from shards.local_store import LocalStore
from shards.object_store import ObjectStore
from shards.storage import StorageError, open_store
from tests.buckets import Outside
from tests.proxy import FaultProxy
from tests.webserver import serve

FACTS: dict[str, Any] = {"config": {"seed": 7, "data": {"batch": 2}}, "shape": {"dim": 3}, "dataset": {"profile": "é"}}
BIG = 20 << 20
"""Bytes of a checkpoint that travels in three parts."""

DYING = """
import os, signal, sys
import torch
from model import checkpoint

class Dying:
    def __init__(self, inner): self.inner, self.left = inner, 9 << 20
    def spend(self, count):
        self.left -= count
        if self.left < 0: os.kill(os.getpid(), signal.SIGKILL)
    def write(self, data): self.spend(memoryview(data).nbytes); return self.inner.write(data)
    def read(self, size=-1): data = self.inner.read(size); self.spend(len(data)); return data
    def __getattr__(self, name): return getattr(self.inner, name)

def die(uri):
    if uri.startswith("s3://"):
        import obstore
        put = obstore.put
        obstore.put = lambda client, key, stream, **how: put(client, key, Dying(stream), **how)
    else:
        save = torch.save
        torch.save = lambda state, stream: save(state, Dying(stream))
    state = checkpoint.Checkpoint(2, {}, {}, {}, {"weight": torch.zeros(5 << 20)}, {})
    checkpoint.save(uri, state, 1)

for uri in sys.argv[1:]:
    child = os.fork()
    if not child:
        die(uri)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def made(step: int, value: float = 1.0, **more: Any) -> Checkpoint:
    model = {"a.weight": torch.full((3, 2), value), "a.steps": torch.tensor(step)}
    optimiser = {"state": {0: {"exp_avg": torch.arange(6.0)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
    return Checkpoint(step, **{**FACTS, "model": model, "optimiser": optimiser, **more})


@pytest.fixture(params=["disk", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "run") if request.param == "disk" else f"{request.getfixturevalue('s3_uri')}/run"


def test_what_is_saved_comes_back(place: str) -> None:
    address = checkpoint.save(place, made(12, ema={"a.weight": torch.full((3, 2), 0.5)}), 3)
    assert address == f"{place}/step-00000012.pt"
    for where in (place, f"{place}/", address, Path(place), Path(address)):
        state = checkpoint.load(where)
        assert (state.step, state.config, state.shape, state.dataset) == (12, *FACTS.values())
        assert torch.equal(state.model["a.weight"], torch.ones(3, 2))
        assert torch.equal(state.optimiser["state"][0]["exp_avg"], torch.arange(6.0))
        assert state.optimiser["param_groups"] == [{"lr": 1e-3, "params": [0]}]
        assert state.ema is not None
        assert torch.equal(state.ema["a.weight"], torch.full((3, 2), 0.5))
        assert state.without is None


def test_files_of_earlier_versions_load(tmp_path: Path) -> None:
    plain = {"config": '{"seed": 7}', "shape": "{}", "dataset": "{}"}
    torch.save({"step": 4, **plain, "model": {"w": torch.ones(2)}, "optimiser": {}}, tmp_path / "step-00000004.pt")
    state = checkpoint.load(tmp_path)
    assert (state.step, state.config, state.ema, state.without) == (4, {"seed": 7}, None, None)


def test_the_oldest_go_and_the_one_just_written_stays(place: str) -> None:
    store = open_store(place)
    foreign = ["step-00000001.txt", "step-1.pt", "step-0000000a.pt", "old/step-00000001.pt", "notes.pt", "step-.pt"]
    for name in foreign:
        store.write(name, b"mine")
    for step in (99_999_999, 9, 100_000_000, 10):
        checkpoint.save(place, made(step), 99)
    names = [f"step-{step:08d}.pt" for step in (9, 10, 99_999_999, 100_000_000)]
    assert checkpoint.found(place) == names
    # Another run went further in this folder: what was just written is not the newest, but it stays.
    checkpoint.save(place, made(8), 2)
    assert checkpoint.found(place) == ["step-00000008.pt", *names[-2:]]
    assert checkpoint.load(place).step == 100_000_000
    assert {entry.name for entry in store.list()} >= set(foreign)


def test_of_two_that_write_one_step_the_last_wins_whole(place: str) -> None:
    for value in (1.0, 2.0):
        checkpoint.save(place, made(5, value), 3)
    assert checkpoint.found(place) == ["step-00000005.pt"]
    assert torch.equal(checkpoint.load(place).model["a.weight"], torch.full((3, 2), 2.0))


def test_a_save_that_is_killed_leaves_the_one_before(tmp_path: Path, s3_uri: str) -> None:
    places = [str(tmp_path / "run"), s3_uri]
    for place in places:
        checkpoint.save(place, made(1), 1)
    killed = subprocess.run([sys.executable, "-c", DYING, *places], capture_output=True, text=True)
    assert killed.stdout.split() == [str(-signal.SIGKILL)] * 2, killed.stderr
    for place in places:
        assert [entry.name for entry in open_store(place).list()] == ["step-00000001.pt"]
        assert checkpoint.found(place) == ["step-00000001.pt"]
        assert checkpoint.load(place).step == 1


def test_what_cannot_be_removed_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(store: LocalStore, names: list[str]) -> None:
        raise PermissionError(13, "Permission denied", names[0])

    checkpoint.save(tmp_path, made(1), 1)
    monkeypatch.setattr(LocalStore, "delete", refuse)
    with pytest.warns(UserWarning, match=r"could not be removed.*step-00000001\.pt"):
        checkpoint.save(tmp_path, made(2), 1)
    assert checkpoint.load(tmp_path).step == 2


def test_hidden_files_of_killed_processes_go_after_a_day(tmp_path: Path) -> None:
    for name in ("old", "new"):
        (tmp_path / f".writing-{name}").write_bytes(b"half")
    os.utime(tmp_path / ".writing-old", (1e9, 1e9))
    checkpoint.save(tmp_path, made(1), 1)
    assert sorted(os.listdir(tmp_path)) == [".writing-new", "step-00000001.pt"]


def test_a_full_disk_is_said(place: str) -> None:
    checkpoint.save(place, made(1), 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(StorageError, match=r"step-00000002\.pt: cannot be written \(File too large"):
            checkpoint.save(place, made(2, model={"w": torch.ones(1 << 20)}), 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [entry.name for entry in open_store(place).list()] == ["step-00000001.pt"]


def test_nothing_there_is_said(place: str) -> None:
    assert checkpoint.found(place) == []
    with pytest.raises(UserError, match=r"step-00000001\.pt: no such checkpoint"):
        checkpoint.load(f"{place}/step-00000001.pt")
    open_store(place).write("notes.txt", b"")
    with pytest.raises(UserError, match=r"no checkpoint \(step-\*\.pt\) in this folder"):
        checkpoint.load(place)


def test_a_cut_newest_is_not_passed_over_in_silence(place: str) -> None:
    for step in (1, 2):
        checkpoint.save(place, made(step), 3)
    store = open_store(place)
    whole = store.read("step-00000002.pt")
    store.write("step-00000002.pt", whole[: len(whole) // 2])
    half = len(whole) // 2
    with pytest.raises(UserError, match=rf"00002\.pt: cut short, .* after {half} bytes.*go on from step-00000001\.pt"):
        checkpoint.load(place)
    assert checkpoint.load(f"{place}/step-00000001.pt").step == 1
    store.delete(["step-00000001.pt"])
    with pytest.raises(UserError, match=r"copy it again$"):
        checkpoint.load(place)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return Path(checkpoint.save(tmp_path_factory.mktemp("whole"), made(3), 1)).read_bytes()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_goes_unseen(whole: bytes, tmp_path: Path, data: st.DataObject) -> None:
    """A cut anywhere is an error; a changed byte is one, or it lies between the tensors."""
    at = data.draw(st.integers(0, len(whole) - 1))
    flip = data.draw(st.integers(0, 255))
    damaged = bytes([*whole[:at], whole[at] ^ flip, *whole[at + 1 :]]) if flip else whole[:at]
    path = tmp_path / "step-00000003.pt"
    path.write_bytes(damaged)
    try:
        state = checkpoint.load(path)
    except UserError as error:
        said = str(error)
        assert said.startswith(str(path))
    else:
        assert flip
        assert torch.equal(state.model["a.weight"], torch.ones(3, 2))
        assert torch.equal(state.optimiser["state"][0]["exp_avg"], torch.arange(6.0))


def test_a_hole_in_the_tensors_is_seen(tmp_path: Path) -> None:
    """torch loads such a file without a word."""
    path = Path(checkpoint.save(tmp_path, made(1, model={"w": torch.ones(1 << 18)}), 1))
    data = bytearray(path.read_bytes())
    data[500_000:504_096] = bytes(4096)
    path.write_bytes(data)
    assert torch.load(path, weights_only=True)["model"]["w"].min() == 0
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load(path)


class Attack:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def raw(**changes: Any) -> dict[str, Any]:
    state = {"step": 3, "config": "{}", "shape": "{}", "dataset": "{}", "model": {}, "optimiser": {}}
    return {key: value for key, value in {**state, **changes}.items() if value is not None}


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_not_run(tmp_path: Path, zipped: bool) -> None:
    marker, path = tmp_path / "ran", tmp_path / "step-00000003.pt"
    torch.save(raw(model=Attack(marker)), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"holds code, \w+\.system, which is not run" if zipped else "not a checkpoint"):
        checkpoint.load(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ([1, 2], r"\(a list\)"),
        ({"state_dict": {}}, "without step, config, shape, dataset, model, optimiser"),
        (raw(optimiser=None), r"\(without optimiser\)"),
        (raw(step=-1), "as step cannot"),
        (raw(step=True), "as step cannot"),
        (raw(step="3", config="[]"), "as step, config cannot"),
        (raw(config="{"), "JSONDecodeError"),
        (raw(dataset=5), "TypeError"),
        (raw(model=torch.ones(2)), "as model cannot"),
        (raw(model={"w": 1}), "as model cannot"),
        (raw(optimiser=[]), "as optimiser cannot"),
        (raw(ema={"w": 1}), "as ema cannot"),
        (raw(without='{"prefix": 1}'), "as without cannot"),
        (raw(step=4), "is of step 4, so it has another one's name"),
    ],
)
def test_other_files_are_one_clear_error(tmp_path: Path, state: Any, message: str) -> None:
    torch.save(state, tmp_path / "step-00000003.pt")
    with pytest.raises(UserError, match=message) as caught:
        checkpoint.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"junk", b"PK\x03\x04", b"PK\x05\x06" + bytes(18)])
def test_files_of_no_format_are_one_clear_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "any.pt").write_bytes(data)
    with pytest.raises(UserError, match=r"any\.pt: (not a checkpoint|cut short)"):
        checkpoint.load(tmp_path / "any.pt")


def test_a_file_that_would_unpack_to_more_is_refused(tmp_path: Path, whole: bytes) -> None:
    with (
        zipfile.ZipFile(io.BytesIO(whole)) as plain,
        zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in plain.namelist():
            packed.writestr(entry, plain.read(entry))
    with pytest.raises(UserError, match="compressed"):
        checkpoint.load(tmp_path / "x.pt")


def test_a_large_one_survives_a_bad_line(s3_uri: str, proxy: FaultProxy) -> None:
    weight = torch.arange(BIG // 4, dtype=torch.float32)
    checkpoint.save(s3_uri, made(1, model={"w": weight}), 1)
    proxy.cut(after=1 << 20, times=2)
    assert torch.equal(checkpoint.load(s3_uri).model["w"], weight)
    assert proxy.counts["cut"] == 2


def test_one_file_may_lie_on_a_web_server(whole: bytes) -> None:
    with serve() as server:
        server.files["/run/best.pt"] = whole
        assert checkpoint.load(f"{server.uri}/run/best.pt").step == 3
        with pytest.raises(UserError, match=r"other\.pt: no such checkpoint"):
            checkpoint.load(f"{server.uri}/run/other.pt")


def test_one_that_is_replaced_while_it_is_read_is_not_mixed(
    s3_uri: str, outside: Outside, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(s3_uri, made(1), 1)
    read = ObjectStore.read_ranges

    def replaced(store: ObjectStore, name: str, ranges: list[tuple[int, int]]) -> list[bytes]:
        parts = read(store, name, ranges)
        outside.write(name, parts[0] + b"more")
        return parts

    monkeypatch.setattr(ObjectStore, "read_ranges", replaced)
    with pytest.raises(StorageError, match="replaced while it was read"):
        checkpoint.load(s3_uri)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lips = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.head = nn.Linear(2, 1)


def test_frozen_parameters_from_a_file_are_left_out(tmp_path: Path) -> None:
    weights = tmp_path / "lips.pt"
    weights.write_bytes(b"tensors")
    without = checkpoint.left_out("lips.", weights)
    first, second = Small(), Small()
    run = tmp_path / "run"
    checkpoint.save(run, made(1, model=first.state_dict(), without=without), 1)
    state = checkpoint.load(run)
    assert set(state.model) == {"head.weight", "head.bias"}
    assert state.without is not None
    assert checkpoint.weights_file(state.without) == weights
    before = second.lips[0].weight.clone()
    checkpoint.restore(second, state)
    assert torch.equal(second.head.weight, first.head.weight)
    assert torch.equal(second.lips[0].weight, before)
    # The same file elsewhere will do, another one will not.
    moved = weights.rename(tmp_path / "moved.pt")
    with pytest.raises(UserError, match=r"lips\.pt: the weights of lips\.\*, No such file"):
        checkpoint.weights_file(state.without)
    assert checkpoint.weights_file(state.without, moved) == moved
    weights.write_bytes(b"tensorz")
    with pytest.raises(UserError, match=r"lips\.pt: other weights than those of the checkpoint"):
        checkpoint.weights_file(state.without)


def test_tensors_of_another_network_are_named(tmp_path: Path) -> None:
    whole = Small().state_dict()
    odd = {"tail": torch.ones(1), **{key: value for key, value in whole.items() if key != "head.bias"}}
    with pytest.raises(UserError, match=r"missing head\.bias; unexpected tail"):
        checkpoint.restore(Small(), made(1, model=odd))
    with pytest.raises(UserError, match=r"size mismatch for head\.bias"):
        checkpoint.restore(Small(), made(1, model={**whole, "head.bias": torch.ones(3)}))


def test_an_archive_behind_something_else_is_refused(tmp_path: Path) -> None:
    # torch would read what lies in front, in its legacy format, and nothing would have checked it.
    path = tmp_path / "step-00000001.pt"
    torch.save({"step": 1}, path, _use_new_zipfile_serialization=False)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("x", b"x")
    path.write_bytes(path.read_bytes() + archive.getvalue())
    assert zipfile.is_zipfile(path)
    with pytest.raises(UserError, match="not a checkpoint of this program"):
        checkpoint.load(path)

"""Public checkpoints: where they are looked for, what is read from them, and what is refused."""

from __future__ import annotations

import hashlib
import http.server
import os
import pickle
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.networks.weights import (
    Checkpoint,
    MissingCheckpoint,
    fetch_all,
    find_checkpoint,
    load_strict,
    load_tensors,
    no_fetching,
)
from shards.errors import UserError

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the user."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "faces2voices" / "weights"


class _Answers(http.server.BaseHTTPRequestHandler):
    files: dict[str, bytes] = {}
    cut = False

    def do_GET(self) -> None:
        data = self.files.get(self.path)
        if data is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if self.cut else data)

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def site() -> Iterator[tuple[str, type[_Answers]]]:
    """Address of a server on this machine, and what it answers."""

    class Answers(_Answers):
        files: dict[str, bytes] = {}

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", Answers
    server.shutdown()
    server.server_close()


def test_a_folder_comes_before_the_cache_and_the_cache_before_the_web(
    tmp_path: Path, home: Path, site: tuple[str, type[_Answers]]
) -> None:
    url, answers = site
    answers.files["/net.pth"] = b"web"
    wanted = Checkpoint("the network", "net.pth", f"{url}/net.pth", hashlib.sha256(b"web").hexdigest())
    folder = tmp_path / "mine"
    folder.mkdir()
    assert find_checkpoint(wanted, folder).read_bytes() == b"web"
    assert (home / "net.pth").read_bytes() == b"web"
    answers.files.clear()
    assert find_checkpoint(wanted, None) == home / "net.pth"
    (folder / "net.pth").write_bytes(b"web")
    assert find_checkpoint(wanted, folder) == folder / "net.pth"


@pytest.mark.parametrize("fault", ["missing", "cut", "other bytes", "no server", "a portal's page"])
def test_a_failed_fetch_leaves_nothing_and_names_url_and_path(
    fault: str, home: Path, site: tuple[str, type[_Answers]]
) -> None:
    url, answers = site
    answers.cut = fault == "cut"
    if fault != "missing":
        answers.files["/net.pth"] = bytes(100_000)
    digest = "00" if fault == "other bytes" else ""
    if fault == "a portal's page":
        answers.files["/net.pth"] = b"<html><body>Please log in"
    if fault == "no server":
        url = "http://127.0.0.1:9"
    with pytest.raises(UserError) as caught:
        find_checkpoint(Checkpoint("the network", "net.pth", f"{url}/net.pth", digest), None)
    message = str(caught.value)
    assert "\n" not in message
    assert f"{url}/net.pth" in message
    assert str(home / "net.pth") in message
    assert "--weights" in message
    assert not [path for path in home.iterdir() if path.name != ".lock"]


def test_nothing_is_fetched_where_that_is_not_wanted_or_not_all_can_be(
    home: Path, tmp_path: Path, site: tuple[str, type[_Answers]]
) -> None:
    url, answers = site
    whole = write(tmp_path / "whole.pth", "plain").read_bytes()
    answers.files |= {"/a.pth": whole, "/b.pth": whole}
    here, there = (Checkpoint(f"network {name}", f"{name}.pth", f"{url}/{name}.pth") for name in "ab")
    own = Checkpoint("network c", "c.pth", hint="ask the authors")
    gaps = []
    with no_fetching():
        for checkpoint in (here, there, own):
            with pytest.raises(MissingCheckpoint) as caught:
                find_checkpoint(checkpoint, None)
            gaps.append(caught.value)
    assert not home.exists()
    with pytest.raises(UserError) as refused:
        fetch_all(gaps)
    for words in ("a.pth", f"{url}/b.pth", "c.pth", "ask the authors"):
        assert words in str(refused.value)
    assert not home.exists()
    fetch_all(gaps[:2])
    assert find_checkpoint(there, None).read_bytes() == whole
    answers.files.clear()
    (home / "a.pth").unlink()
    (home / "b.pth").unlink()
    with pytest.raises(UserError, match=r"a\.pth.*Not Found.*\n.*b\.pth.*\n.*--weights"):
        fetch_all(gaps[:2])


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"typo: no such folder.*--weights"):
        find_checkpoint(Checkpoint("the network", "net.pth", "http://x/net.pth"), tmp_path / "typo")


def test_a_file_with_another_digest_is_refused(tmp_path: Path) -> None:
    (tmp_path / "net.pth").write_bytes(b"other")
    with pytest.raises(UserError, match="sha256"):
        find_checkpoint(Checkpoint("the network", "net.pth", "http://x/net.pth", "ab" * 32), tmp_path)


def test_without_a_public_url_the_hint_says_where_to_get_it(home: Path) -> None:
    with pytest.raises(UserError, match="ask the authors") as caught:
        find_checkpoint(Checkpoint("the network", "net.pth", hint="ask the authors"), None)
    assert str(home / "net.pth") in str(caught.value)


def write(path: Path, form: str) -> Path:
    """TENSORS as one of the forms in which checkpoints are published."""
    if form == "safetensors":
        from safetensors.torch import save_file

        save_file(TENSORS, path.with_suffix(".safetensors"))
        return path.with_suffix(".safetensors")
    if form == "script":
        net = nn.ModuleDict({"a": nn.Linear(3, 2)})
        net.load_state_dict(TENSORS)
        torch.jit.script(_Named(net["a"])).save(str(path))
        return path
    tree = {
        "plain": TENSORS,
        "old": TENSORS,
        "module": {f"module.{name}": value for name, value in TENSORS.items()},
        "wrapped": {"epoch": 3, "state_dict": TENSORS},
        "zip": TENSORS,
    }[form]
    torch.save(tree, path, _use_new_zipfile_serialization=form != "old")
    if form == "zip":
        with zipfile.ZipFile(path.with_suffix(".zip"), "w") as archive:
            archive.write(path, "inner.pth")
        return path.with_suffix(".zip")
    return path


class _Named(nn.Module):
    def __init__(self, a: nn.Module) -> None:
        super().__init__()
        self.a = a

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x)


@pytest.mark.parametrize("form", ["plain", "old", "module", "wrapped", "zip", "safetensors", "script"])
def test_every_public_form_gives_the_same_tensors(form: str, tmp_path: Path) -> None:
    found = load_tensors(write(tmp_path / "net.pth", form), "the network")
    assert found.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch ran",)


def test_code_in_a_checkpoint_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": _Evil()}, "evil.pth")
    Path("bare.pth").write_bytes(pickle.dumps(_Evil()))
    for name in ("evil.pth", "bare.pth"):
        with pytest.raises(UserError, match="plain tensors"):
            load_tensors(Path(name), "the network")
    assert not Path("ran").exists()


class _Script(nn.Module):
    """Tensors of every kind that a network has, some of them views of one storage."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Linear(5, 5, bias=False))
        self.few = nn.Parameter(torch.randn(3).half())
        whole = torch.arange(24)
        self.register_buffer("turned", whole.reshape(4, 6).T)
        self.register_buffer("part", whole[7:11])
        self.sizes = [1, 2]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.stack(x)


class _Running(_Script):
    """Its archive has a method that is called when it is loaded."""

    @torch.jit.export
    def __getstate__(self) -> tuple[torch.Tensor, bool]:
        return self.few, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]) -> None:
        assert False, "it ran"  # noqa: B011, PT015


def test_a_torchscript_archive_is_read_and_not_run(tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.jit.script(_Script()).save(str(tmp_path / "s.zip"))
    wanted = torch.jit.load(str(tmp_path / "s.zip")).state_dict()
    found = load_tensors(tmp_path / "s.zip", "the network")
    assert found.keys() == wanted.keys()
    assert len(found) > 8
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)
    torch.jit.script(_Running()).save(str(tmp_path / "runs.zip"))
    with pytest.raises(torch.jit.Error, match="it ran"):
        torch.jit.load(str(tmp_path / "runs.zip"))
    with pytest.raises(UserError, match="plain tensors"):
        load_tensors(tmp_path / "runs.zip", "the network")


def test_damage_and_other_content_are_one_line(tmp_path: Path) -> None:
    whole = write(tmp_path / "net.pth", "plain").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.safetensors").write_bytes(b"not tensors at all")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({0: torch.ones(2)}, tmp_path / "numbered.pth")
    (tmp_path / "portal.pth").write_bytes(b"<html><body>Please log in")
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        archive.writestr("a", b"")
        archive.writestr("b", b"")
    more = ("numbered.pth", "portal.pth")
    for name in ("cut.pth", "empty.pth", "text.safetensors", "list.pth", "two.zip", "absent.pth", *more):
        with pytest.raises(UserError, match="the network") as caught:
            load_tensors(tmp_path / name, "the network")
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
        assert "weights_only" not in str(caught.value)
    with pytest.raises(UserError, match=r"begins with b'<html>.*fetch it again"):
        load_tensors(tmp_path / "portal.pth", "the network")


def test_tensors_of_another_network_are_named(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    own = dict(net.state_dict())
    old = {name: value + 1 for name, value in own.items() if not name.endswith("num_batches_tracked")}
    load_strict(net, old, tmp_path, "the network")
    assert torch.equal(net[0].weight, old["0.weight"])
    wrong = {**old, "extra": own["0.bias"], "0.weight": torch.zeros(9, 9)}
    del wrong["0.bias"]
    with pytest.raises(UserError, match=r"1 missing, e\.g\. 0\.bias; 1 unknown, e\.g\. extra; 1 of another shape"):
        load_strict(net, wrong, tmp_path, "the network")

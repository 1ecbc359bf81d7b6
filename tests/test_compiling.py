"""Compiling parts of the network: where it works, where it cannot, and what must not be taken for a failure of it."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model import compiling
from model.compiling import compile_parts
from model.config import ModelConfig
from model.faces2voices import FacesToVoices
from shards.config import merge

SMALL = {
    "identity_dim": 8,
    "expression_dim": 8,
    "units": 20,
    "timbre_dim": 8,
    "encoder": {"dim": 16, "layers": 1, "heads": 2, "ffn": 32, "blocks": 1},
    "decoder": {"channels": (16, 16), "head_dim": 8, "mid_blocks": 1},
}
LIPS = {"stem": 8, "stem_stride": 4, "trunk": (8, 8, 8, 8), "trunk_blocks": 1, "dim": 16, "layers": 2, "heads": 2}
LIPS |= {"ffn": 32, "pos_kernel": 4, "pos_groups": 2}


STILL = {
    "encoder": dict.fromkeys(("dropout", "attention_dropout", "head_dropout", "fusion_dropout"), 0.0),
    "decoder": {"dropout": 0.0},
    "lip_encoder": {"dropout": 0.0},
}
"""Compiled dropout draws other numbers than eager dropout."""


def still(frozen: bool) -> FacesToVoices:
    """A network without dropout."""
    torch.manual_seed(0)
    whole = {**SMALL, "lip_encoder": {**LIPS, "frozen": frozen}}
    return FacesToVoices(ModelConfig.model_validate(merge(whole, STILL))).train()


def network(frozen: bool) -> FacesToVoices:
    torch.manual_seed(0)
    return FacesToVoices(ModelConfig.model_validate({**SMALL, "lip_encoder": {**LIPS, "frozen": frozen}})).train()


def batch(frames: int = 12) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(frames)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "lips": normal(2, 1, frames, 88, 88),
        "identity": normal(2, frames, 8),
        "expression": normal(2, frames, 8),
        "frames": torch.tensor([frames, frames - 3]),
        "units": torch.randint(20, (2, 2 * frames), generator=generator),
        "timbre": normal(2, 8),
        "pitch": normal(2, 2 * frames),
        "energy": normal(2, 2 * frames),
        "mel": normal(2, 80, 2 * frames),
    }


def step(net: FacesToVoices, data: dict[str, Tensor], amp: bool = False) -> Tensor:
    """Loss and all gradients of one step, as one vector."""
    torch.manual_seed(3)
    net.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        loss = net.losses(data, torch.Generator().manual_seed(0))["loss"]
    loss.backward()
    gradients = [parameter.grad.flatten() for parameter in net.parameters() if parameter.grad is not None]
    return torch.cat([loss.detach()[None], *gradients])


@pytest.fixture
def one_block(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """The one part is a small one, and nothing compiled earlier is at hand."""
    monkeypatch.setattr(compiling, "_parts", lambda net: iter([net.decoder.final.norm]))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._inductor.config.patch(compile_threads=1):
        yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("one_block")
def test_without_a_compiler_training_goes_on_and_says_so() -> None:
    net, data, said = network(True), batch(), []
    before = step(net, data)
    with torch._inductor.config.patch({"cpp.cxx": ("/nonexistent/g++",)}):
        assert not compile_parts(net, said.append, lambda: step(net, data))
    assert len(said) == 1
    assert said[0].startswith("torch.compile failed (")
    assert said[0].endswith("); going on without it")
    assert "nonexistent" in said[0] or "ompiler" in said[0]
    assert "\n" not in said[0]
    assert torch.equal(step(net, data), before)


@pytest.mark.usefixtures("one_block")
def test_a_compiled_part_serves_training_alone_and_no_copy_of_it() -> None:
    net, data = network(True), batch()
    keys, before = list(net.state_dict()), step(net, data)
    buffers = {name: value.clone() for name, value in net.named_buffers()}
    said: list[str] = []
    assert compile_parts(net, said.append, lambda: step(net, data))
    assert not said
    assert list(net.state_dict()) == keys
    assert all(torch.equal(value, buffers[name]) for name, value in net.named_buffers())
    torch.testing.assert_close(step(net, data), before, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.utils.counters.clear()
    step(net, batch())
    for frames in (5, 6, 7):
        with torch.no_grad():
            net.losses(batch(frames), torch.Generator())
    average = copy.deepcopy(net).train()
    step(average, batch(9))
    assert not torch._dynamo.utils.counters["stats"]  # nothing was compiled again


@pytest.mark.usefixtures("one_block")
def test_a_fault_of_the_step_itself_is_raised() -> None:
    net, said = network(True), []

    def fault() -> None:
        raise torch.OutOfMemoryError("no room for the batch")

    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        compile_parts(net, said.append, fault)
    assert not said


RUN = """
import sys, hashlib, torch
from tests.test_compiling import batch, network, step, still
from model.compiling import compile_parts
torch.set_num_threads(1)
frozen, amp = sys.argv[1] == "frozen", sys.argv[2] == "amp"
net, data = still(frozen), batch()
plain = step(net, data, amp)
assert compile_parts(net, print, lambda: step(net, data, amp))
found = step(net, data, amp)
off = (found - plain).norm() / plain.norm()
net = network(frozen)
assert compile_parts(net, print, lambda: step(net, data, amp))
found = torch.cat([found, step(net, data, amp)])
again = torch._dynamo.utils.counters["stats"]["unique_graphs"]
step(net, batch(), amp)
assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == again
print(float(off), hashlib.sha256(found.numpy().tobytes()).hexdigest())
"""


@pytest.mark.nightly
@pytest.mark.parametrize("lips", ["frozen", "trained"])
@pytest.mark.parametrize("precision", ["plain", "amp"])
def test_a_compiled_step_is_the_eager_one_and_the_same_in_every_process(
    tmp_path: Path, lips: str, precision: str
) -> None:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    command = [sys.executable, "-c", RUN, lips, precision]
    root = Path(__file__).resolve().parent.parent
    # The second process finds compiled code, the first had to make it.
    cold, warm = (
        subprocess.run(command, env=environment, cwd=root, check=True, capture_output=True, text=True).stdout.split()
        for _ in range(2)
    )
    assert cold == warm
    assert float(cold[0]) < (0.05 if precision == "amp" else 1e-4)

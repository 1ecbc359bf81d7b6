"""Training by several processes, in parts, with a moving average: the same run, however it is split."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from model import checkpoint
from model.synthesis import load_network
from model.train import train
from shards.errors import UserError
from tests.test_train import SMALL, config, losses
from tests.toy import toy_dataset

STILL = ["data.batch=4", "model.decoder.dropout=0", "model.lip_encoder.dropout=0"]
STILL += [f"model.encoder.{name}dropout=0" for name in ("", "attention_", "head_", "fusion_")]
"""Dropout depends on the process, so runs that are split in different ways agree only without it. The lip encoder's
BatchNorm takes its statistics over a part, so these tests give it weights that stay."""


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> str:
    # Clips of unequal length: processes have unequal numbers of valid frames.
    return toy_dataset(tmp_path_factory.mktemp("toy"), [[30, 14, 25], [13, 22, 16]]).uri


@pytest.fixture(scope="module")
def frozen(toy: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of a run whose lip encoder is frozen, with weights in a file."""
    folder = tmp_path_factory.mktemp("weights")
    train(toy, folder / "run", config("steps=1"))
    state = checkpoint.load(folder / "run")
    prefix = "lip_encoder.network."
    torch.save({k.removeprefix(prefix): v for k, v in state.model.items() if k.startswith(prefix)}, folder / "lips.pt")
    return [*STILL, "model.lip_encoder.frozen=true", f"lip_weights={folder / 'lips.pt'}"]


def torchrun(processes: int, toy: str, run: Path, overrides: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", "0"]
    command += ["--standalone", "-m", "cli.main", "train", toy, str(run)]
    command += [part for override in [*SMALL, *overrides] for part in ("--set", override)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)


def assert_alike(one: Path, other: Path) -> None:
    a, b = losses(one), losses(other)
    assert a.keys() == b.keys()
    np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-4)
    first, second = checkpoint.load(one), checkpoint.load(other)
    for name, value in first.model.items():
        torch.testing.assert_close(value, second.model[name], rtol=1e-3, atol=1e-4)


def test_parts_give_the_gradient_of_the_whole(toy: str, frozen: list[str], tmp_path: Path) -> None:
    train(toy, tmp_path / "whole", config(*frozen, "steps=4"))
    train(toy, tmp_path / "parts", config(*frozen, "steps=4", "accumulate=4"))
    assert_alike(tmp_path / "whole", tmp_path / "parts")


def test_two_processes_train_as_one_stop_together_and_hand_over(toy: str, frozen: list[str], tmp_path: Path) -> None:
    process = torchrun(2, toy, tmp_path / "two", [*frozen, "steps=100000", "checkpoint_every=100000", "accumulate=2"])
    assert process.stderr is not None
    # Should a process hang, this ends it.
    guard = threading.Timer(200, os.killpg, (process.pid, signal.SIGKILL))
    guard.start()
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("step 3 "):
            break
    # As a batch system does: to every process of the job, and torchrun passes it on once more.
    os.killpg(process.pid, signal.SIGTERM)
    output, rest = process.communicate()
    guard.cancel()
    said = "".join(lines) + rest
    step = checkpoint.load(tmp_path / "two").step
    assert step >= 3, said
    assert len(re.findall(rf"^step {step} epoch", said, re.M)) == 1
    assert output.count("goes on from the last checkpoint") == 1
    # Another number of processes goes on, and all of it is as one process would have done it.
    train(toy, tmp_path / "one", config(*frozen, f"steps={step + 2}"))
    train(toy, tmp_path / "two", config(*frozen, f"steps={step + 2}"))
    assert_alike(tmp_path / "one", tmp_path / "two")
    # The frozen part lies in its file, not in the checkpoint.
    state = checkpoint.load(tmp_path / "two")
    assert not any(name.startswith("lip_encoder.network.") for name in state.model)
    lips = torch.load(state.without["path"], weights_only=True)  # type: ignore[index]
    network = load_network(state)
    assert torch.equal(network.lip_encoder.network.layer_norm.weight, lips["layer_norm.weight"])
    other = tmp_path / "other.pt"
    torch.save({name: value + 1 for name, value in lips.items()}, other)
    with pytest.raises(UserError, match="other weights than those of the checkpoint"):
        load_network(state, other)


def test_the_moving_average_goes_on_and_is_what_speaks(toy: str, tmp_path: Path) -> None:
    train(toy, tmp_path / "whole", config("steps=5", "ema=0.9"))
    train(toy, tmp_path / "parts", config("steps=3", "ema=0.9"))
    at_three = checkpoint.load(tmp_path / "parts")
    train(toy, tmp_path / "parts", config("steps=5", "ema=0.9"))
    whole, parts = checkpoint.load(tmp_path / "whole"), checkpoint.load(tmp_path / "parts")
    assert whole.ema is not None
    assert parts.ema is not None
    assert at_three.ema is not None
    assert all(torch.equal(value, parts.ema[name]) for name, value in whole.ema.items())
    spoken = load_network(whole).state_dict()
    name = "encoder.to_mel.weight"
    assert torch.equal(spoken[name], whole.ema[name])
    assert not torch.equal(spoken[name], whole.model[name])
    # Between where it was and where the parameters are.
    before, now, end = at_three.ema[name], whole.ema[name], whole.model[name]
    moved = ((now - before) * (end - before)).sum()
    assert moved > 0

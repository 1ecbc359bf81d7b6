"""Training of the vocoder: the loss falls, and a stopped run goes on as if never stopped."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cli.main import main
from model import checkpoint
from model.griffinlim import playable
from model.vocoder.config import GeneratorConfig
from model.vocoder.hifigan import Generator
from model.vocoder.load import load_vocoder
from model.vocoder.train import silenced, train_vocoder
from model.vocoder.train_config import VocoderConfig, vocoder_config
from shards.errors import UserError
from shards.mel import log_mel
from tests import toy
from tests.toy import toy_dataset, toy_values

TINY = [
    "size=tiny",
    "data.batch=2",
    "data.crop_frames=6",
    "data.workers=0",
    "threads=1",
    "log_every=1",
    "checkpoint_every=3",
    "validation.every=0",
    "peak_tflops=1",
    "discriminator_from=2",
    "model={factors: [20, 16], kernels: [40, 32], channels: 16, block_kernels: [3], block_dilations: [[1]]}",
    "discriminators={periods: [3], period_channels: [4, 4], scale_channels: [4, 4], scale_kernels: [15, 15], "
    "scale_strides: [1, 4], scale_groups: [1, 2]}",
]


def config(*overrides: str) -> VocoderConfig:
    return vocoder_config(None, [*TINY, *overrides])


def sung(frames: int) -> NDArray[np.int16]:
    """Eight harmonics of a tone whose pitch depends on the length."""
    time = np.arange(640 * frames) / 16_000
    tones = [np.sin(2 * np.pi * (100 + frames) * k * time) for k in range(1, 9)]
    return (3000 * np.sum(tones, axis=0)).astype(np.int16)


def sung_dataset(folder: Path, shards: list[list[int]]) -> str:
    """A dataset of harmonic tones and their mels."""

    def values(key: str, frames: int, split: str = "train") -> dict[str, Any]:
        wav = sung(frames)
        return {**toy_values(key, frames, split), "wav": wav, "mel": log_mel(wav / 32768)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "toy_values", values)
        return toy_dataset(folder, shards, fields=("wav", "mel", "units", "timbre", "energy")).uri


@pytest.fixture(scope="module")
def songs(tmp_path_factory: pytest.TempPathFactory) -> str:
    return sung_dataset(tmp_path_factory.mktemp("sung"), [[30, 25], [22, 14]])


def scalars(folder: Path, name: str) -> dict[int, float]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(name)}


@pytest.mark.parametrize(
    "extra", [["ema=0.9", "robust.noise=0.5"], ["data.fields=[wav, mel, units, timbre]", "robust.blur=1"]]
)
def test_a_stopped_run_goes_on_as_if_never_stopped(songs: str, tmp_path: Path, extra: list[str]) -> None:
    train_vocoder(songs, tmp_path / "whole", config("steps=6", *extra))
    train_vocoder(songs, tmp_path / "parts", config("steps=4", *extra))
    result = train_vocoder(songs, tmp_path / "parts", config("steps=6", *extra))
    assert result.step == 6
    for name in ("train/loss", "train/discriminators", "train/grad_norm"):
        assert scalars(tmp_path / "parts", name) == scalars(tmp_path / "whole", name)
    whole, parts = (checkpoint.load(tmp_path / name) for name in ("whole", "parts"))
    for a, b in ((whole.model, parts.model), (whole.ema or {}, parts.ema or {})):
        assert a.keys() == b.keys()
        assert all(torch.equal(value, b[name]) for name, value in a.items())
    for part in ("generator", "discriminators"):
        one, other = whole.optimiser[part]["state"], parts.optimiser[part]["state"]
        assert all(torch.equal(one[key]["exp_avg"], other[key]["exp_avg"]) for key in one)
    assert set(scalars(tmp_path / "whole", "train/adversarial")) == {3, 4, 5, 6}  # from the third step on


def test_the_loss_falls_and_the_checkpoint_speaks(songs: str, tmp_path: Path) -> None:
    more = ["steps=80", "discriminator_from=1000", "robust.gain=0", "log_every=10", "ema=0.9"]
    result = train_vocoder(
        songs, tmp_path, config(*more, "model.channels=32", "optimiser.lr=0.01", "checkpoint_every=80")
    )
    assert result.last < 0.6 * result.first
    vocoder = load_vocoder(tmp_path, "htk")
    assert vocoder.name == "HiFi-GAN, step 80"
    assert vocoder({"mel": np.zeros((30, 80), np.float32)}).shape == (320 * 30,)


def test_validation_holds_griffin_lim_beside_the_vocoder(tmp_path: Path) -> None:
    lengths = [14, 15]
    uri = sung_dataset(tmp_path / "ds", [lengths])
    run = tmp_path / "run"
    wanted = ["validation={every: 1, split: train, clips: 9, samples: 1}", "steps=2", "discriminator_from=9"]
    wanted += ["amp=true"]  # which validation is not measured with
    train_vocoder(uri, run, config(*wanted, "checkpoint_every=2"))
    vocoder = load_vocoder(run, "htk")
    sums = np.zeros(2)
    for frames in lengths:
        mel = log_mel(sung(frames) / 32768)
        made = vocoder({"mel": mel}), playable(mel)
        sums += [np.abs(log_mel(wave) - mel).mean() * frames for wave in made]
    found = [scalars(run, "valid/mel_l1")[2], scalars(run, "valid/griffin_lim_mel_l1")[1]]
    np.testing.assert_allclose(found, sums / sum(lengths), rtol=1e-4)
    assert set(scalars(run, "valid/griffin_lim_fine_l1")) == {1}  # once is enough
    assert set(scalars(run, "valid/fine_l1")) == {1, 2}
    tags = EventAccumulator(str(run)).Reload().Tags()["audio"]
    assert len({tag.split("/")[0] for tag in tags}) == 1
    assert {tag.split("/")[1] for tag in tags} == {"true", "griffin_lim", "spoken"}


def test_sigterm_leaves_a_checkpoint(songs: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cli.main", "vocoder", "train", songs, str(tmp_path)]
    command += [part for key in [*TINY, "checkpoint_every=100000"] for part in ("--set", key)]
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, start_new_session=True, **pipes)  # type: ignore[call-overload]
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 3 "):
            break
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "goes on from the last checkpoint" in output
    assert checkpoint.load(tmp_path).step >= 3


def test_two_processes_train_as_one(songs: str, tmp_path: Path) -> None:
    keys = [*TINY, "steps=3", "discriminators.scales=2", "robust.noise=0.1"]
    train_vocoder(songs, tmp_path / "one", vocoder_config(None, keys))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command += ["--standalone", "-m", "cli.main", "vocoder", "train", songs, str(tmp_path / "two")]
    command += [part for key in keys for part in ("--set", key)]
    subprocess.run(command, check=True, capture_output=True)
    one, two = (checkpoint.load(tmp_path / name) for name in ("one", "two"))
    for name, value in one.model.items():
        torch.testing.assert_close(value, two.model[name], rtol=1e-3, atol=1e-4)


def test_a_run_may_begin_with_another(songs: str, tmp_path: Path) -> None:
    train_vocoder(songs, tmp_path / "first", config("steps=3"))
    train_vocoder(songs, tmp_path / "second", config("steps=1", f"begin={tmp_path / 'first'}", "optimiser.lr=1e-9"))
    first, second = (checkpoint.load(tmp_path / name).model for name in ("first", "second"))
    for name, value in first.items():
        if "spectral" not in name and "_u" not in name and "_v" not in name:
            torch.testing.assert_close(second[name], value, rtol=0, atol=1e-6, msg=name)
    with pytest.raises(UserError, match=r"another generator than the run's: channels is 16, not 32; set model"):
        train_vocoder(songs, tmp_path / "third", config("steps=1", f"begin={tmp_path / 'first'}", "model.channels=32"))
    state = checkpoint.load(tmp_path / "first")
    state.dataset["stages"]["mel"]["settings"]["filterbank"] = "slaney"
    checkpoint.save(tmp_path / "slaney", state, keep=1)
    with pytest.raises(UserError, match=r"was trained on slaney mels, this dataset has htk mels; begin with a run on"):
        train_vocoder(songs, tmp_path / "third", config("steps=1", f"begin={tmp_path / 'slaney'}"))


def test_a_run_may_begin_with_a_public_generator(songs: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    layers = {"factors": [10, 8, 2, 2], "kernels": [20, 16, 4, 4], "block_dilations": [[1, 3, 5]]}
    layers |= {"channels": 16, "block": 1, "block_kernels": [3]}
    public = Generator(GeneratorConfig.model_validate(layers)).fold().state_dict()
    torch.save({"generator": public}, tmp_path / "g_00001000")
    more = ["size=paper", f"model={layers}", f"begin={tmp_path / 'g_00001000'}", "steps=1", "optimiser.lr=1e-12"]
    train_vocoder(songs, tmp_path / "run", config(*more))
    mel = {"mel": log_mel(sung(14) / 32768)}
    ours, theirs = (load_vocoder(tmp_path / name, "htk")(mel) for name in ("run", "g_00001000"))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_padding_is_silent() -> None:
    mel = silenced(torch.zeros(2, 80, 6), torch.tensor([3, 2]))
    assert not mel[0].any()
    assert not mel[1, :, :4].any()
    np.testing.assert_allclose(mel[1, :, 4:], np.log(1e-5), rtol=1e-6)


def test_a_loss_that_is_not_finite_names_the_clips(songs: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(f"clips are in {tmp_path}/step-000000")):
        train_vocoder(songs, tmp_path, config("steps=50", "optimiser.lr=1e30", "discriminator_from=0"))
    [note] = tmp_path.glob("step-*-not-finite.json")
    assert "s0c" in note.read_text() or "s1c" in note.read_text()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model.channels=32",), r"model\.channels was 16, is 32"),
        (("discriminators.periods=[5]",), r"discriminators\.periods was \[3\], is \[5\]"),
        (("robust.gain=0", "discriminator_from=7"), r"discriminator_from was 2, is 7, robust\.gain was 6\.0, is 0"),
    ],
)
def test_another_configuration_is_refused(songs: str, tmp_path: Path, overrides: tuple[str, ...], message: str) -> None:
    train_vocoder(songs, tmp_path, config("steps=1"))
    with pytest.raises(UserError, match=message):
        train_vocoder(songs, tmp_path, config("steps=2", *overrides))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.fields=[mel]", "data: fields: a vocoder reads wav and mel"),
        ("data.fields=[wav, mel, lips]", "data: fields: a vocoder reads wav and mel"),
        ("model.units=3", r"model\.units follows from the dataset"),
        ("model.factors=[8, 8]", "their product is 64, the hop is 320"),
        ("discriminator=1", "unknown key 'discriminator'"),
        ("validation={every: 1, split: dev}", r"validation\.split: no split 'dev'.*splits are train"),
    ],
)
def test_what_cannot_be_is_said(
    songs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    argv = [part for key in [*TINY, override] for part in ("--set", key)]
    assert main(["vocoder", "train", songs, str(tmp_path), *argv]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not checkpoint.found(tmp_path)

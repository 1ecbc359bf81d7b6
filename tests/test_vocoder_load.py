"""Vocoders by name: Griffin-Lim, runs of our own, and public HiFi-GAN files in every form that is passed on."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from model import checkpoint
from model.checkpoint import Checkpoint
from model.griffinlim import playable
from model.vocoder.config import GeneratorConfig, generator_config
from model.vocoder.hifigan import Generator
from model.vocoder.load import HiFiGAN, load_vocoder
from shards.errors import UserError

State = dict[str, Tensor]
NEW, OLD = ".parametrizations.weight.original", (".weight_g", ".weight_v")


@cache
def network() -> Generator:
    """The paper's generator, narrow, with weights that give a lively wave."""
    torch.manual_seed(4)
    made = Generator(GeneratorConfig(channels=16)).eval()
    with torch.no_grad():
        for name, value in made.named_parameters():
            if name.endswith("original0"):
                value.mul_(2)
    return made


def public(made: Generator | None = None) -> State:
    """Its tensors under the public names, with weight norm in torch's older form."""
    state = (made or network()).state_dict()
    return {
        key.replace(f"{NEW}0", OLD[0]).replace(f"{NEW}1", OLD[1]): value
        for key, value in state.items()
        if not key.startswith("mel_")
    }


def newer() -> State:
    return {key: value for key, value in network().state_dict().items() if not key.startswith("mel_")}


def folded() -> State:
    """Plain weights: torch's own fold, of a copy."""
    copy = Generator(network().config)
    copy.load_state_dict(network().state_dict())
    for module in copy.modules():
        if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
            nn.utils.parametrize.remove_parametrizations(module, "weight")
    return {key: value for key, value in copy.state_dict().items() if not key.startswith("mel_")}


def within(prefix: str, state: State) -> State:
    return {f"{prefix}{key}": value for key, value in state.items()}


FORMS: dict[str, Callable[[], Any]] = {
    "AdaptVC": lambda: {"generator": {"model": public(), "optimizer": {"state": {}}}, "discriminator": {}, "step": 7},
    "AdaptVC of several GPUs": lambda: {"generator": {"model": within("module.", public())}},
    "HiFi-GAN": lambda: {"generator": public()},
    "newer torch": lambda: {"generator": newer()},
    "folded": lambda: {"generator": folded()},
    "plain": public,
    "Lightning": lambda: {
        "state_dict": {**within("generator.", public()), "mpd.discriminators.0.convs.0.bias": torch.zeros(3)},
        "epoch": 3,
        "hyper_parameters": argparse.Namespace(lr=1e-4),
    },
    "Lightning of AdaptVC": lambda: {"state_dict": within("generator.model.", newer())},
}


def mel(frames: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(-5, 2, (frames, 80)).astype(np.float32)


def wave_of(made: Generator, sound: np.ndarray) -> np.ndarray:
    """The wave of a whole mel at once."""
    with torch.inference_mode():
        return made(torch.from_numpy(sound.T.copy())[None])[0, 0].numpy()


@pytest.mark.parametrize("form", FORMS)
def test_public_files_give_the_wave_of_the_network_that_was_saved(form: str, tmp_path: Path) -> None:
    path = tmp_path / "g_02500000"
    torch.save(FORMS[form](), path)
    vocoder = load_vocoder(path, "htk")
    assert (vocoder.name, vocoder.needs) == ("HiFi-GAN, g_02500000", ("mel",))
    found = vocoder({"mel": mel(17)})
    wanted = wave_of(network(), mel(17))
    assert found.dtype == np.float32
    assert wanted.std() > 0.01
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_the_layout_of_speech_resynthesis_is_told_by_its_kernels(tmp_path: Path) -> None:
    config = GeneratorConfig(factors=(5, 4, 4, 2, 2), kernels=(11, 8, 8, 4, 4), channels=32)
    made = Generator(config).eval()
    torch.save({"generator": public(made)}, tmp_path / "g")
    np.testing.assert_allclose(load_vocoder(tmp_path / "g", "htk")({"mel": mel(9)}), wave_of(made, mel(9)), atol=1e-6)


class Trap:
    """Unpickled by torch or pickle, it would make a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    torch.save({"generator": public(), "trap": Trap(tmp_path / "sprung")}, tmp_path / "g")
    load_vocoder(tmp_path / "g", "htk")
    assert not (tmp_path / "sprung").exists()


def of_hop_256() -> State:
    state = public()
    for number, kernel in enumerate((16, 16, 4, 4)):
        old = state[f"ups.{number}.weight_v"]
        state[f"ups.{number}.weight_v"] = torch.zeros(*old.shape[:2], kernel)
    return state


def without(name: str) -> State:
    return {key: value for key, value in public().items() if key != name}


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "hop 256": (lambda: {"generator": of_hop_256()}, "hop of 320 .* kernels are 16, 16, 4, 4, not 20, 16, 4, 4 or"),
    "channels": (
        lambda: {"generator": {**public(), "conv_pre.weight_v": torch.zeros(16, 336, 7)}},
        "reads 336 channels .* a mel has 80",
    ),
    "block 2": (
        lambda: {key.replace("convs1", "convs"): value for key, value in public().items() if "convs2" not in key},
        "no resblocks.0.convs1.0.weight",
    ),
    "a layer missing": (lambda: without("ups.2.bias"), "missing ups.2.bias"),
    "another network": (lambda: nn.Linear(3, 3).state_dict() | {"encoder.a.weight": torch.zeros(1)}, "it holds .*enc"),
    "a strange prefix": (lambda: within("net_g.dec.", public()), "no conv_pre.* it holds net_g.dec.conv_"),
    "discriminators": (lambda: {"mpd": {"a": 1}, "optim_g": {}}, "no tensors by name .* holds mpd, optim_g"),
    "a list": (lambda: [1, 2], "no table of tensors"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_files_are_refused_with_what_they_hold(case: str, tmp_path: Path) -> None:
    make, words = REFUSED[case]
    torch.save(make(), tmp_path / "g")
    with pytest.raises(UserError, match=words) as caught:
        load_vocoder(tmp_path / "g", "htk")
    assert str(tmp_path / "g") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_places_without_a_vocoder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such checkpoint"):
        load_vocoder(tmp_path / "nothing", "htk")
    with pytest.raises(UserError, match="no checkpoint"):
        load_vocoder(tmp_path, "htk")
    (tmp_path / "sound.wav").write_bytes(b"RIFF0000")
    with pytest.raises(UserError, match=r"no file that torch\.save wrote"):
        load_vocoder(tmp_path / "sound.wav", "htk")
    torch.save({"generator": public()}, tmp_path / "whole")
    (tmp_path / "cut").write_bytes((tmp_path / "whole").read_bytes()[:5000])
    with pytest.raises(UserError, match="damaged, cut short"):
        load_vocoder(tmp_path / "cut", "htk")


def run_state(made: Generator, **changes: Any) -> Checkpoint:
    """What a training run saves, discriminators included."""
    tensors = within("generator.", made.state_dict()) | {"discriminators.periods.0.convs.0.bias": torch.zeros(3)}
    facts: dict[str, Any] = {
        "step": 2000,
        "config": {},
        "shape": made.config.model_dump(mode="json"),
        "dataset": {"stages": {"mel": {"settings": {"filterbank": "htk"}}}},
        "model": tensors,
        "optimiser": {},
    }
    return Checkpoint(**facts | changes)


def tiny() -> Generator:
    torch.manual_seed(2)
    made = Generator(generator_config("tiny", channels=16)).eval()
    made.mel_mean.fill_(-4.0)
    made.mel_std.fill_(2.5)
    return made


def test_a_runs_folder_and_its_checkpoint_give_its_wave(tmp_path: Path) -> None:
    made = tiny()
    address = checkpoint.save(tmp_path, run_state(made), keep=1)
    wanted = wave_of(made, mel(11))
    for place in (tmp_path, str(tmp_path), address):
        vocoder = load_vocoder(place, "htk")
        assert vocoder.name == "HiFi-GAN, step 2000"
        np.testing.assert_allclose(vocoder({"mel": mel(11)}), wanted, atol=1e-6)


def test_averaged_parameters_are_used_where_a_run_has_them(tmp_path: Path) -> None:
    made, average = tiny(), tiny()
    with torch.no_grad():
        for value in average.parameters():
            value.add_(0.05 * torch.randn_like(value))
    ema = within("generator.", dict(average.named_parameters()))
    checkpoint.save(tmp_path, run_state(made, ema={key: value.detach() for key, value in ema.items()}), keep=1)
    found = load_vocoder(tmp_path, "htk")({"mel": mel(11)})
    np.testing.assert_allclose(found, wave_of(average, mel(11)), atol=1e-6)
    assert not np.allclose(found, wave_of(made, mel(11)), atol=1e-3)


def test_a_vocoder_of_another_filterbank_is_refused(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, run_state(tiny()), keep=1)
    with pytest.raises(UserError, match="trained on htk mels, these are slaney mels"):
        load_vocoder(tmp_path, "slaney")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"decoder.a": torch.zeros(1)}}, "no vocoder's checkpoint, it holds decoder"),
        ({"shape": {"system": "svts"}}, "unknown key 'system'"),
        ({"shape": {"channels": 32}}, "no vocoder's checkpoint of this version"),
        ({"dataset": {}}, "does not say which filterbank"),
    ],
)
def test_other_runs_are_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    checkpoint.save(tmp_path, run_state(tiny(), **changes), keep=1)
    with pytest.raises(UserError, match=words):
        load_vocoder(tmp_path, "htk")


SPEECH = {"weights": "w", "codebook": "c", "settings": {"encoder": "whisper_tiny", "layer": 3}}


@pytest.mark.parametrize(
    ("reads", "change", "words"),
    [
        ({"units": 30}, {"codebook": "d"}, r"units of another speech stage \(codebook\)"),
        ({"timbre_dim": 6}, {"weights": "v"}, r"timbre of another speech stage \(weights\)"),
        ({"timbre_dim": 6}, {"codebook": "d"}, ""),  # timbre is not held against centroids
        ({}, {"weights": "v", "codebook": "d"}, ""),
    ],
)
def test_units_and_timbre_of_another_stage_are_refused(
    reads: dict[str, int], change: dict[str, str], words: str, tmp_path: Path
) -> None:
    made = Generator(generator_config("tiny", channels=16, **reads))
    dataset = {"stages": {"mel": {"settings": {"filterbank": "htk"}}, "speech": SPEECH}}
    checkpoint.save(tmp_path, run_state(made, dataset=dataset), keep=1)
    assert load_vocoder(tmp_path, "htk", speech=SPEECH).name == "HiFi-GAN, step 2000"
    if not words:
        load_vocoder(tmp_path, "htk", speech={**SPEECH, **change})
        return
    with pytest.raises(UserError, match=words):
        load_vocoder(tmp_path, "htk", speech={**SPEECH, **change})


def test_none_is_griffin_lim() -> None:
    vocoder = load_vocoder(None, "slaney")
    assert (vocoder.name, vocoder.needs) == ("Griffin-Lim", ("mel",))
    assert np.array_equal(vocoder({"mel": mel(4)}, seed=3), playable(mel(4), "slaney", 3))


@cache
def narrow_vocoder() -> HiFiGAN:
    copy = Generator(network().config)
    copy.load_state_dict(network().state_dict())
    return HiFiGAN(copy, "any")


@settings(max_examples=8, deadline=None)
@given(frames=st.integers(2, 90), piece=st.integers(1, 40))
def test_pieces_give_the_samples_of_the_whole(frames: int, piece: int) -> None:
    sound = mel(frames, seed=frames)
    vocoder = narrow_vocoder()
    vocoder.piece = piece
    np.testing.assert_allclose(vocoder({"mel": sound}), wave_of(network(), sound), atol=2e-6)


def test_units_and_timbre_are_read_where_the_network_was_trained_with_them(tmp_path: Path) -> None:
    torch.manual_seed(3)
    made = Generator(generator_config("tiny", channels=16, units=30, timbre_dim=6)).eval()
    checkpoint.save(tmp_path, run_state(made), keep=1)
    vocoder = load_vocoder(tmp_path, "htk")
    assert vocoder.needs == ("mel", "units", "timbre")
    assert isinstance(vocoder, HiFiGAN)
    vocoder.piece = 7
    units, timbre = np.arange(25, dtype=np.int16), np.linspace(-1, 1, 6, dtype=np.float32)
    whole = made(
        torch.from_numpy(mel(25).T.copy())[None], torch.from_numpy(units).long()[None], torch.from_numpy(timbre)[None]
    )
    found = vocoder({"mel": mel(25), "units": units, "timbre": timbre})
    np.testing.assert_allclose(found, whole[0, 0].detach().numpy(), atol=2e-6)
    faults: list[tuple[dict[str, np.ndarray], str]] = [
        ({"mel": mel(25), "timbre": timbre}, "units: this vocoder reads"),
        ({"mel": mel(25), "units": units[:-1], "timbre": timbre}, "units: expected"),
        ({"mel": mel(25), "units": units + 6, "timbre": timbre}, "knows 30 units"),
        ({"mel": mel(25), "units": units, "timbre": timbre * np.nan}, "timbre: expected finite"),
        ({"mel": mel(25).T, "units": units, "timbre": timbre}, "log-mel"),
    ]
    for spoken, words in faults:
        with pytest.raises(ValueError, match=words):
            vocoder(spoken)

"""HiFi-GAN: generator against another implementation, discriminators, losses, and what training segments undergo."""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.parametrize import remove_parametrizations

from model.flow import Place
from model.vocoder.config import (
    DiscriminatorConfig,
    GeneratorConfig,
    discriminator_config,
    generator_config,
)
from model.vocoder.discriminators import Discriminators
from model.vocoder.hifigan import Generator
from model.vocoder.losses import discriminator_loss, feature_loss, generator_loss, loss_mel, mel_loss
from model.vocoder.robust import RobustConfig, blurred, roughen
from shards.errors import UserError
from shards.mel import log_mel

NARROW = {"channels": 16}
RESYNTHESIS = {"factors": (5, 4, 4, 2, 2), "kernels": (11, 8, 8, 4, 4), "channels": 32}
ONE_BLOCK = {"block": 2, "block_kernels": (3, 7), "block_dilations": ((1, 3), (1, 2, 5))}
FLOOR = math.log(1e-5)


def count(network: nn.Module) -> int:
    return sum(value.numel() for value in network.parameters())


def test_the_papers_generator_has_14_45_million_parameters() -> None:
    # Layer by layer: inputs * outputs * kernel + outputs.
    wanted = 80 * 512 * 7 + 512 + 16 * 1 * 7 * 2 + 1
    for width, kernel in ((512, 20), (256, 16), (128, 4), (64, 4)):
        half = width // 2
        wanted += width * half * kernel + half
        wanted += sum(6 * (half * half * size + half) for size in (3, 7, 11))
    network = Generator(GeneratorConfig())
    assert count(network.fold()) == wanted
    assert round(wanted / 1e6, 2) == 14.45


def test_the_papers_discriminators_have_the_parameters_of_the_public_ones() -> None:
    network = Discriminators(DiscriminatorConfig())
    sides = [1, 32, 128, 512, 1024, 1024]
    period = sum(a * b * 5 + b for a, b in pairwise(sides)) + 1024 * 3 + 1
    layers = [(1, 128, 15, 1), (128, 128, 41, 4), (128, 256, 41, 16), (256, 512, 41, 16), (512, 1024, 41, 16)]
    layers += [(1024, 1024, 41, 16), (1024, 1024, 5, 1), (1024, 1, 3, 1)]
    scale = sum(a * b * kernel // groups + b for a, b, kernel, groups in layers)
    # Weight norm has a length more for each output channel, spectral norm has none.
    lengths = 5 * (sum(sides[1:]) + 1) + 2 * sum(b for _, b, _, _ in layers)
    assert count(network) == 5 * period + 3 * scale + lengths


@pytest.mark.parametrize("keys", [NARROW, RESYNTHESIS])
def test_generator_gives_the_wave_of_another_implementation(keys: dict[str, object]) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = GeneratorConfig.model_validate(keys)
    ours = Generator(config).fold().eval()
    other = transformers.SpeechT5HifiGan(
        transformers.SpeechT5HifiGanConfig(
            upsample_initial_channel=config.channels,
            upsample_rates=list(config.factors),
            upsample_kernel_sizes=list(config.kernels),
            normalize_before=False,
        )
    ).eval()
    with torch.no_grad():
        for value in ours.parameters():
            value.mul_(2)  # as torch begins, the wave hardly differs from its offset
    state = {key.replace("ups.", "upsampler."): value for key, value in ours.state_dict().items()}
    state |= {"mean": torch.zeros(80), "scale": torch.ones(80)}
    del state["mel_mean"], state["mel_std"]
    other.load_state_dict(state)
    mel = torch.randn(2, 80, 23) * 2 - 5
    with torch.inference_mode():
        one, two = ours(mel), other(mel.transpose(1, 2))
    assert one.shape == (2, 1, 23 * 320)
    assert one.std() > 0.01
    torch.testing.assert_close(one[:, 0], two, atol=1e-5, rtol=0)


def test_mel_statistics_standardise_the_input() -> None:
    network = Generator(GeneratorConfig.model_validate(NARROW)).eval()
    mel = torch.randn(1, 80, 6)
    plain = network(mel)
    network.mel_mean.fill_(-4.0)
    network.mel_std.fill_(2.0)
    torch.testing.assert_close(network(mel * 2 - 4), plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("keys", [NARROW, RESYNTHESIS, {**NARROW, **ONE_BLOCK}])
def test_reach_is_as_far_as_a_frame_is_felt(keys: dict[str, object]) -> None:
    torch.manual_seed(0)
    network = Generator(GeneratorConfig.model_validate(keys)).fold().double().eval()
    reach = network.reach
    frames = 2 * reach + 5
    with torch.no_grad():
        for name, value in network.named_parameters():
            # Nothing cancels out, and tanh stays far from its ends.
            value.copy_(torch.full_like(value, 0.1 / value[0].numel() if name.endswith("weight") else 0.1))
    mel = torch.ones(1, 80, frames, dtype=torch.float64, requires_grad=True)
    middle = frames // 2
    network(mel)[0, 0, 320 * middle : 320 * (middle + 1)].sum().backward()
    assert mel.grad is not None
    felt = torch.nonzero(mel.grad[0].abs().sum(dim=0)).flatten()
    assert max(middle - int(felt.min()), int(felt.max()) - middle) == reach


def test_folded_weights_give_the_same_wave() -> None:
    network = Generator(GeneratorConfig.model_validate({**NARROW, **ONE_BLOCK})).eval()
    mel = torch.randn(1, 80, 9)
    before = network(mel)
    torch.testing.assert_close(network.fold()(mel), before, atol=1e-6, rtol=0)
    assert not any("parametrizations" in key for key in network.state_dict())


def test_units_and_speaker_beside_the_mel_change_the_wave_where_they_stand() -> None:
    torch.manual_seed(0)
    network = Generator(generator_config("tiny", channels=16, units=50, timbre_dim=24)).eval()
    frames, reach = 40, network.reach
    mel, units, speaker = torch.randn(1, 80, frames), torch.randint(0, 50, (1, frames)), torch.randn(1, 24)
    wave = network(mel, units, speaker)
    assert wave.shape == (1, 1, 320 * frames)
    other = units.clone()
    other[0, 20] = (other[0, 20] + 1) % 50
    differs = (network(mel, other, speaker) != wave)[0, 0].reshape(frames, 320).any(dim=1)
    assert differs[20]
    assert not differs[: 20 - reach].any()
    assert not differs[20 + reach + 1 :].any()
    voice = (network(mel, units, -speaker) != wave)[0, 0].reshape(frames, 320).any(dim=1)
    assert voice.all()
    with pytest.raises(ValueError, match="speech units"):
        network(mel, None, speaker)
    with pytest.raises(ValueError, match="speaker embedding"):
        network(mel, units)
    with pytest.raises(ValueError, match="expected a mel"):
        network(mel.transpose(1, 2), units, speaker)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"factors": (8, 8, 2, 2)}, "product is 256, the hop is 320"),
        ({"kernels": (20, 16, 4)}, "3 of them for 4 factors"),
        ({"kernels": (20, 16, 4, 5)}, "plus an even number"),
        ({"channels": 24}, "cannot be halved 4 times"),
        ({"block_kernels": (3, 6, 11)}, "must be odd"),
        ({"block_dilations": ((1, 3, 5),)}, "one list for each"),
        ({"mel_bins": 100}, "unknown key 'mel_bins'"),
    ],
)
def test_generators_that_cannot_be_are_refused(keys: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        generator_config("paper", **keys)


def test_discriminators_judge_at_their_periods_and_rates() -> None:
    torch.manual_seed(0)
    network = Discriminators(discriminator_config("tiny", scales=3)).eval()
    wave = torch.randn(2, 1, 8960)
    scores, features = network(wave)
    assert len(scores) == len(features) == 5 + 3
    assert all(score.shape[0] == 2 and score.dim() == 2 for score in scores)
    assert all(torch.equal(layers[-1].flatten(1), score) for layers, score in zip(features, scores, strict=True))
    rates = [layers[0].shape[-1] for layers in features[5:]]
    assert rates == [8960, 4481, 2241]
    # A sample of phase 3 is seen by the fourth column of period 5 alone.
    other = wave.clone()
    other[:, :, 4003] += 1
    touched = (network(other)[1][2][-1] != features[2][-1]).any(dim=0).any(dim=0).any(dim=0)
    assert touched.tolist() == [False, False, False, True, False]


def test_first_scale_has_layers_of_spectral_norm_one() -> None:
    torch.manual_seed(0)
    network = Discriminators(discriminator_config("tiny", scales=2))
    with torch.no_grad():
        for name, value in network.scales.named_parameters():
            if "original" in name:
                value.mul_(5)  # as layers begin, their norms are not far from 1
    wave = torch.randn(1, 1, 2048)
    for _ in range(100):  # each is a step of the power iteration
        network(wave)
    norms = []
    for scale in network.scales:
        convs = [layer for layer in scale.modules() if isinstance(layer, nn.Conv1d)]
        for conv in convs:
            for key in list(getattr(conv, "parametrizations", {})):
                remove_parametrizations(conv, key)
        weights = [conv.weight.detach().double().numpy() for conv in convs]
        norms.append([np.linalg.svd(one.reshape(len(one), -1), compute_uv=False)[0] for one in weights])
    np.testing.assert_allclose(norms[0], 1, rtol=0.02)
    assert max(norms[1]) > 2  # weight norm leaves the others free


def test_losses_are_those_of_the_formulas() -> None:
    rng = np.random.default_rng(0)
    real, made = ([rng.normal(size=(2, n)).astype(np.float32) for n in (3, 7)] for _ in range(2))
    tensors = [torch.from_numpy(x) for x in real], [torch.from_numpy(x) for x in made]
    wanted = sum(float(((1 - m) ** 2).mean()) for m in made)
    assert generator_loss(tensors[1]).item() == pytest.approx(wanted, rel=1e-5)
    wanted = sum(float(((1 - r) ** 2).mean() + (m**2).mean()) for r, m in zip(real, made, strict=True))
    assert discriminator_loss(*tensors).item() == pytest.approx(wanted, rel=1e-5)
    wanted = sum(float(np.abs(r - m).mean()) for r, m in zip(real, made, strict=True))
    assert feature_loss([tensors[0]], [tensors[1]]).item() == pytest.approx(wanted, rel=1e-5)


def test_feature_matching_moves_only_the_made_waves() -> None:
    real, made = torch.randn(2, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    feature_loss([[real]], [[made]]).backward()
    assert real.grad is None
    assert made.grad is not None


def test_loss_mel_is_librosas() -> None:
    librosa = pytest.importorskip("librosa")
    wave = np.random.default_rng(3).normal(0, 0.1, 8960).astype(np.float32)
    wave[4000:] *= 1e-6  # down to the floor
    padded = np.pad(wave, 384, mode="reflect")
    filters = librosa.filters.mel(sr=16000, n_fft=1024, n_mels=80, fmin=0, fmax=8000)
    spectra = np.abs(librosa.stft(padded, n_fft=1024, hop_length=256, center=False))
    wanted = np.log(np.maximum(filters @ np.sqrt(spectra**2 + 1e-9), 1e-5))
    found = loss_mel(torch.from_numpy(wave)[None, None])
    assert found.shape == (1, 80, 35)
    np.testing.assert_allclose(found[0].numpy(), wanted, atol=2e-4)


def test_mel_loss_has_a_finite_slope_in_silence() -> None:
    made = torch.zeros(1, 1, 4000, requires_grad=True)
    mel_loss(torch.randn(1, 1, 4000), made).backward()
    assert made.grad is not None
    assert torch.isfinite(made.grad).all()


@cache
def segments(rows: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Waves of noise that is silent in their second half, and their log-mels."""
    waves = np.random.default_rng(7).normal(0, 0.05, (rows, 320 * 28))
    waves[:, 320 * 14 :] = 0
    mels = np.stack([log_mel(wave).T for wave in waves])
    return torch.from_numpy(waves).float()[:, None], torch.from_numpy(mels)


def test_gain_is_on_wave_and_mel_alike_and_silence_stays() -> None:
    wave, mel = segments(8)
    louder, shifted = roughen(wave, mel, RobustConfig(gain=6), torch.Generator().manual_seed(0))
    factors = (louder[:, 0, :1000] / wave[:, 0, :1000]).mean(dim=1)
    assert (factors > 1.2).any()
    assert (factors < 0.8).any()
    assert ((factors >= 10 ** (-6 / 20) - 1e-4) & (factors <= 10 ** (6 / 20) + 1e-4)).all()
    wanted = torch.from_numpy(np.stack([log_mel(one[0].double().numpy()).T for one in louder]))
    torch.testing.assert_close(shifted, wanted, atol=1e-3, rtol=0)
    assert (shifted[:, :, 20:] == np.float32(FLOOR)).all()


def test_gain_keeps_within_full_scale() -> None:
    wave, mel = segments(8)
    wave = wave / wave.abs().amax(dim=(1, 2), keepdim=True)
    louder, shifted = roughen(wave, mel, RobustConfig(gain=20), torch.Generator().manual_seed(0))
    assert louder.abs().max() <= 1 + 1e-6
    kept = louder.abs().amax(dim=(1, 2)) > 0.9999
    assert kept.any()
    torch.testing.assert_close(shifted[kept], mel[kept], atol=1e-5, rtol=0)


def test_blur_is_scipys_gaussian() -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    mel = torch.randn(3, 80, 20)
    sigma = torch.tensor([0.1, 0.6, 1.0])
    wanted = [
        ndimage.gaussian_filter(one.numpy(), float(s), radius=4, mode="nearest")
        for one, s in zip(mel, sigma, strict=True)
    ]
    torch.testing.assert_close(blurred(mel, sigma), torch.from_numpy(np.stack(wanted)), atol=1e-5, rtol=0)


def test_noise_has_the_deviation_that_is_asked_for() -> None:
    wave, mel = segments()
    same, noisy = roughen(wave, mel, RobustConfig(gain=0, noise=0.3), torch.Generator().manual_seed(0))
    assert torch.equal(same, wave)
    assert (noisy - mel).std().item() == pytest.approx(0.3, rel=0.05)


@settings(max_examples=6, deadline=None)
@given(first=st.integers(0, 3), seed=st.integers(0, 1000))
def test_a_segment_meets_the_same_in_any_part_of_a_batch(first: int, seed: int) -> None:
    wave, mel = segments()
    config = RobustConfig(gain=6, blur=0.5, noise=0.1)
    whole = roughen(wave, mel, config, torch.Generator().manual_seed(seed))
    part = roughen(wave[first:], mel[first:], config, torch.Generator().manual_seed(seed), Place(first, 4))
    for one, other in zip(whole, part, strict=True):
        torch.testing.assert_close(one[first:], other, atol=1e-5, rtol=0)

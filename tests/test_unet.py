"""The U-Net decoder: published size, padding, time, and its activation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from model.config import DecoderConfig, ModelConfig
from model.flow import flow_loss, sample
from model.layers import length_mask
from model.unet import MaskedGroupNorm, SnakeBeta, UNet, time_embedding

SMALL = DecoderConfig(channels=(16, 24), head_dim=8)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_default_has_the_published_size() -> None:
    with torch.device("meta"):
        network = UNet(DecoderConfig())
    assert sum(parameter.numel() for parameter in network.parameters()) / 1e6 == pytest.approx(11.01, abs=0.005)


@pytest.mark.parametrize(("valid", "length"), [(2, 12), (6, 12), (10, 20)])
def test_a_clip_is_the_same_alone_and_padded(valid: int, length: int) -> None:
    network = UNet(SMALL).eval()
    x, mu, t = noise(2, 80, length), noise(2, 80, length, seed=1), torch.tensor([0.2, 0.9])
    x[0, :, valid:] = 1e3
    mu[0, :, valid:] = -1e3
    alone = network(x[:1, :, :valid], t[:1], mu[:1, :, :valid], torch.ones(1, valid, dtype=torch.bool))
    batch = network(x, t, mu, length_mask(torch.tensor([valid, length]), length))
    torch.testing.assert_close(batch[:1, :, :valid], alone, rtol=1e-4, atol=1e-4)
    assert batch[0, :, valid:].abs().max() == 0


def test_group_norm_equals_torch_on_valid_frames() -> None:
    ours, theirs = MaskedGroupNorm(16), nn.GroupNorm(8, 16)
    with torch.no_grad():
        for norm in (ours, theirs):
            norm.weight.copy_(noise(16, seed=1))
            norm.bias.copy_(noise(16, seed=2))
    x = noise(2, 16, 9)
    found = ours(x, length_mask(torch.tensor([9, 5]), 9))
    torch.testing.assert_close(found[:1], theirs(x[:1]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1:, :, :5], theirs(x[1:, :, :5]), rtol=1e-4, atol=1e-5)


def test_condition_and_time_matter() -> None:
    network = UNet(SMALL).eval()
    x, mu, mask = noise(1, 80, 8), noise(1, 80, 8, seed=1), torch.ones(1, 8, dtype=torch.bool)
    base = network(x, torch.tensor([0.1]), mu, mask)
    assert base.shape == (1, 80, 8)
    assert (base - network(x, torch.tensor([0.8]), mu, mask)).abs().max() > 1e-3
    assert (base - network(x, torch.tensor([0.1]), mu * 0, mask)).abs().max() > 1e-3


def test_time_embedding_equals_numpy() -> None:
    t = np.array([0.0, 0.25, 1.0])
    rates = np.exp(-np.log(10_000) * np.arange(80) / 79)
    angles = 1000 * t[:, None] * rates
    expected = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    np.testing.assert_allclose(time_embedding(torch.from_numpy(t), 160).numpy(), expected, atol=1e-3)


def test_snake_beta_equals_its_formula() -> None:
    module = SnakeBeta(3)
    with torch.no_grad():
        module.alpha.copy_(noise(3, seed=1))
        module.beta.copy_(noise(3, seed=2))
    x = noise(4, 3)
    a, b = np.exp(module.alpha.detach().numpy()), np.exp(module.beta.detach().numpy())
    expected = x.numpy() + np.sin(x.numpy() * a) ** 2 / b
    np.testing.assert_allclose(module(x).detach().numpy(), expected, rtol=1e-5, atol=1e-6)


def test_every_parameter_learns() -> None:
    network = UNet(SMALL)
    network(
        noise(2, 80, 8), torch.rand(2), noise(2, 80, 8), torch.ones(2, 8, dtype=torch.bool)
    ).square().sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum()] == []


def test_a_residual_decoder_learns_to_take_noise_away_in_a_minute() -> None:
    """With the true mel as its mean, sampling must end near that mel; predicting mu alone would leave the noise in."""
    torch.manual_seed(0)
    config = ModelConfig.preset("tiny")
    network = UNet(config.decoder)
    optimiser = torch.optim.AdamW(network.parameters(), lr=2e-3)
    mask = torch.ones(8, 40, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    for step in range(30):
        mel = torch.nn.functional.interpolate(noise(8, 80, 10, seed=step), size=40, mode="linear")
        loss = flow_loss(network, mel, mel, mask, config.flow, generator)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    network.eval()
    mel = torch.nn.functional.interpolate(noise(8, 80, 10, seed=999), size=40, mode="linear")
    with torch.no_grad():
        spoken = sample(network, mel, mask, generator)
    # Noise left as it was would be off by 1 (standard deviation); the mel itself has 0.8.
    assert (spoken - mel).std() < 0.5

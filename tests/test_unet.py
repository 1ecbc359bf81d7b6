"""The U-Net decoder: published size, padding, time, and its activation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import DecoderConfig, ModelConfig
from model.flow import flow_loss, sample
from model.layers import length_mask
from model.unet import MaskedGroupNorm, SnakeBeta, UNet, time_embedding

SMALL = DecoderConfig(channels=(16, 24), head_dim=8)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomise(network: UNet) -> UNet:
    """Every parameter away from its start, so that zeros and ones do not hide a fault."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


def test_default_has_the_published_size() -> None:
    with torch.device("meta"):
        network = UNet(DecoderConfig())
    assert sum(parameter.numel() for parameter in network.parameters()) / 1e6 == pytest.approx(11.01, abs=0.005)


@pytest.mark.parametrize(("valid", "length"), [(2, 12), (6, 12), (10, 20)])
@pytest.mark.parametrize("residual", [False, True])
def test_a_clip_is_the_same_alone_and_padded(valid: int, length: int, residual: bool) -> None:
    network = randomise(UNet(SMALL.model_copy(update={"residual": residual})))
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


def transformer_block(state: dict[str, Tensor], x: Tensor, heads: int) -> Tensor:
    x = x.transpose(1, 2)
    y = F.layer_norm(x, x.shape[-1:], state["attention_norm.weight"], state["attention_norm.bias"])
    q, k, v = (part.unflatten(-1, (heads, -1)) for part in (y @ state["qkv.weight"].T).chunk(3, dim=-1))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    y = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)
    x = x + F.linear(y, state["out.0.weight"], state["out.0.bias"])
    y = F.layer_norm(x, x.shape[-1:], state["ffn_norm.weight"], state["ffn_norm.bias"])
    y = F.linear(y, state["ffn.0.weight"], state["ffn.0.bias"])
    y = y + torch.sin(y * torch.exp(state["ffn.1.alpha"])) ** 2 / torch.exp(state["ffn.1.beta"])
    return (x + F.linear(y, state["ffn.3.weight"], state["ffn.3.bias"])).transpose(1, 2)


def conv_block(state: dict[str, Tensor], x: Tensor) -> Tensor:
    x = F.conv1d(x, state["conv.weight"], state["conv.bias"], padding=1)
    return F.mish(F.group_norm(x, 8, state["norm.weight"], state["norm.bias"]))


def part(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}


def level(state: dict[str, Tensor], x: Tensor, time: Tensor, pairs: int) -> Tensor:
    for pair in range(pairs):
        here = part(state, f"residuals.{pair}")
        y = conv_block(part(here, "block1"), x)
        y = y + F.linear(F.mish(time), here["time.weight"], here["time.bias"])[..., None]
        x = conv_block(part(here, "block2"), y) + F.conv1d(x, here["shortcut.weight"], here["shortcut.bias"])
        x = transformer_block(part(state, f"transformers.{pair}"), x, SMALL.heads)
    return x


def test_network_is_wired_as_published() -> None:
    """One clip alone, written down once more in plain functions of torch: what feeds what, and in which order."""
    network = randomise(UNet(SMALL))
    s = network.state_dict()
    x, mu, t = noise(1, 80, 12), noise(1, 80, 12, seed=1), torch.tensor([0.3])
    angles = 1000 * t[:, None] * torch.exp(-torch.arange(80) * (np.log(10_000) / 79))
    time = F.linear(torch.cat([angles.sin(), angles.cos()], dim=-1), s["time.0.weight"], s["time.0.bias"])
    time = F.linear(F.silu(time), s["time.2.weight"], s["time.2.bias"])
    first = level(part(s, "down1"), torch.cat([x, mu], dim=1), time, 1)
    y = F.conv1d(first, s["halve.weight"], s["halve.bias"], stride=2, padding=1)
    second = level(part(s, "down2"), y, time, 1)
    y = F.conv1d(second, s["bottom.weight"], s["bottom.bias"], padding=1)
    y = level(part(s, "middle"), y, time, SMALL.mid_blocks)
    y = level(part(s, "up2"), torch.cat([y, second], dim=1), time, 1)
    y = F.conv_transpose1d(y, s["stretch.weight"], s["stretch.bias"], stride=2, padding=1)
    y = level(part(s, "up1"), torch.cat([y, first], dim=1), time, 1)
    y = conv_block(part(s, "final"), F.conv1d(y, s["top.weight"], s["top.bias"], padding=1))
    expected = F.conv1d(y, s["head.weight"], s["head.bias"])
    torch.testing.assert_close(network(x, t, mu, torch.ones(1, 12, dtype=torch.bool)), expected, rtol=1e-3, atol=1e-3)


def test_attention_mask_is_boolean(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask of numbers would be added to the scores, and the padding would still be attended to."""
    attend, masks = F.scaled_dot_product_attention, []

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        masks.append(kwargs["attn_mask"])
        return attend(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    UNet(SMALL)(noise(2, 80, 8), torch.rand(2), noise(2, 80, 8), length_mask(torch.tensor([8, 6]), 8))
    assert len(masks) == 2 + 2 + SMALL.mid_blocks
    for mask in masks:
        assert mask.dtype == torch.bool
        valid = mask.shape[-1]
        assert mask.flatten(1).sum(-1).tolist() == [valid, valid * 6 // 8]


def test_weights_start_as_published() -> None:
    torch.manual_seed(0)
    network = UNet(DecoderConfig(channels=(64, 64), mid_blocks=1))
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv1d | nn.Linear):
            fan_in = module.weight[0].numel()
            assert module.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.1), name
            assert module.bias is None or not module.bias.any(), name
    reach = (1 / (64 * 4)) ** 0.5  # torch's own start of the transposed convolution: uniform
    assert network.stretch.weight.abs().max().item() == pytest.approx(reach, rel=0.02)


def test_a_batch_of_one_and_the_shortest_clip() -> None:
    network = UNet(SMALL).eval()
    for length in (2, 4, 6, 14):
        mask = torch.ones(1, length, dtype=torch.bool)
        found = network(noise(1, 80, length), torch.tensor([0.5]), noise(1, 80, length), mask)
        assert found.shape == (1, 80, length)
        assert torch.isfinite(found).all()


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

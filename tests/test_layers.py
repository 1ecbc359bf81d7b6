"""Shared pieces of the networks against plain numpy, and their behaviour on padded frames."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.layers import (
    BlindConv,
    ConvNeXtBlock,
    Fusion,
    GlobalResponseNorm,
    Transformer,
    Up2,
    length_mask,
    masked_mean,
    rotary_angles,
    rotate,
)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomise(module: torch.nn.Module) -> torch.nn.Module:
    """Every parameter away from its start, so that zeros and ones do not hide a fault."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


@pytest.mark.parametrize(("kernel", "gap"), [(15, 5), (3, 1), (9, 7)])
def test_blind_conv_never_sees_its_own_frames(kernel: int, gap: int) -> None:
    conv = randomise(BlindConv(6, 4, kernel, gap))
    x = noise(1, 61, 6).requires_grad_()
    conv(x, torch.ones(1, 61, dtype=torch.bool))[0, 30].sum().backward()
    assert x.grad is not None
    seen = set(x.grad[0].abs().sum(-1).nonzero().flatten().tolist())
    half, blind = kernel // 2, (gap - 1) // 2
    assert seen == {30 + offset for offset in range(-half, half + 1) if abs(offset) > blind}


def test_global_response_norm_equals_its_formula_over_valid_frames() -> None:
    norm = randomise(GlobalResponseNorm(5))
    x = noise(2, 7, 5)
    frames = np.array([7, 4])
    got = norm(x, length_mask(torch.from_numpy(frames), 7)).detach().numpy()
    gamma, beta = norm.gamma.detach().numpy(), norm.beta.detach().numpy()
    for row, valid in enumerate(frames):
        clip = x[row, :valid].numpy().astype(np.float64)
        energy = np.sqrt((clip**2).sum(axis=0))
        expected = gamma * clip * (energy / (energy.mean() + 1e-6)) + beta + clip
        np.testing.assert_allclose(got[row, :valid], expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(
    valid=st.integers(1, 12),
    extra=st.integers(1, 9),
    piece=st.sampled_from(["convnext", "transformer", "fusion", "blind", "up2"]),
)
def test_padding_never_reaches_a_clip(valid: int, extra: int, piece: str) -> None:
    module = {
        "convnext": ConvNeXtBlock(8, 7, 4),
        "transformer": Transformer(8, 2, 2, 16, 0.1),
        "fusion": Fusion(8, 0.1),
        "blind": BlindConv(8, 8, 5, 3),
        "up2": Up2(8, 6),
    }[piece]
    randomise(module)
    x = noise(2, valid + extra, 8)
    x[0, valid:] = 1e3
    mask = length_mask(torch.tensor([valid, valid + extra]), valid + extra)
    inputs = (x, x.flip(0).roll(1, 0)) if piece == "fusion" else (x,)
    alone = module(*(part[:1, :valid] for part in inputs), mask[:1, :valid])
    batch = module(*inputs, mask)
    torch.testing.assert_close(batch[:1, : alone.shape[1]], alone, rtol=1e-4, atol=1e-4)


def test_up2_doubles_any_length() -> None:
    for length in (1, 2, 7):
        assert Up2(3, 4)(noise(2, length, 3), torch.ones(2, length, dtype=torch.bool)).shape == (
            2,
            2 * length,
            4,
        )


def test_rotary_positions_are_relative_and_standard() -> None:
    angles = rotary_angles(50, 8, torch.device("cpu"))
    # Pair i of position p as a complex number turned by p * 10000^(-2i/d).
    x = noise(1, 1, 50, 8)
    turned = rotate(x, angles)[0, 0].numpy()
    pairs = (x[0, 0, :, :4] + 1j * x[0, 0, :, 4:]).numpy()
    rates = np.array([10_000 ** (-2 * i / 8) for i in range(4)])
    expected = pairs * np.exp(1j * np.arange(50)[:, None] * rates)
    np.testing.assert_allclose(turned, np.concatenate([expected.real, expected.imag], axis=-1), atol=2e-5)
    # The product of a query and a key depends on their distance alone.
    q, k = noise(8, seed=1).expand(1, 1, 50, 8), noise(8, seed=2).expand(1, 1, 50, 8)
    scores = (rotate(q, angles) @ rotate(k, angles).transpose(-1, -2))[0, 0]
    assert math.isclose(scores[3, 10], scores[30, 37], abs_tol=1e-4)


def test_transformer_knows_order() -> None:
    module = randomise(Transformer(8, 1, 2, 16, 0.0))
    x, mask = noise(1, 6, 8), torch.ones(1, 6, dtype=torch.bool)
    assert not torch.allclose(module(x.flip(1), mask).flip(1), module(x, mask), atol=1e-3)


def test_masked_mean_counts_valid_frames_only() -> None:
    values = torch.tensor([[1.0, 2.0, float("nan")], [3.0, 100.0, 100.0]])
    assert masked_mean(values, length_mask(torch.tensor([2, 1]), 3)).item() == pytest.approx(2.0)

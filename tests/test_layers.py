"""Shared pieces of the networks against plain numpy, and their behaviour on padded frames."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from model.config import EncoderConfig
from model.layers import (
    BlindConv,
    ConvNeXtBlock,
    Fusion,
    GlobalResponseNorm,
    TimeConv,
    Transformer,
    Up2,
    length_mask,
    masked_mean,
    mean_over_time,
    position_angles,
    rotate,
    sinusoids,
)
from model.predictors import MaskedPredictor, Predictor


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


M = TypeVar("M", bound=nn.Module)


def randomise(module: M) -> M:
    """Every parameter away from its start, so that zeros and ones do not hide a fault."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def block(dim: int = 8, kernel: int = 7, drop_path: float = 0.0) -> ConvNeXtBlock:
    return ConvNeXtBlock(dim, kernel, 4, norm_eps=1e-6, grn_eps=1e-6, drop_path=drop_path)


def transformer(positions: Literal["rotary", "sinusoidal"] = "rotary", layers: int = 2) -> Transformer:
    return Transformer(8, layers, 2, 16, 0.1, 0.1, positions)


def reach(module: nn.Module, frame: int, inputs: int, length: int, mask: Tensor) -> list[int]:
    """Input frames that output frame `frame` depends on."""
    x = noise(1, length, inputs).requires_grad_()
    module(x, mask)[0, frame].sum().backward()
    assert x.grad is not None
    return x.grad[0].abs().sum(-1).nonzero().flatten().tolist()


def gelu(x: Any) -> Any:
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def layer_norm(x: Any, norm: nn.LayerNorm) -> Any:
    x = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + norm.eps)
    return x * array(norm.weight) + array(norm.bias)


def convolve(x: Any, conv: nn.Conv1d) -> Any:
    """Same padding, [T, inputs] -> [T, outputs]; depthwise where the weight says so."""
    weight, taps = array(conv.weight), conv.kernel_size[0]
    padded = np.pad(x, ((taps // 2, taps // 2), (0, 0)))
    if conv.groups > 1:
        parts = [padded[k : k + len(x)] * weight[:, 0, k] for k in range(taps)]
    else:
        parts = [padded[k : k + len(x)] @ weight[:, :, k].T for k in range(taps)]
    return sum(parts) + array(conv.bias)


def array(x: Tensor | None) -> Any:
    assert x is not None
    return x.detach().numpy().astype(np.float64)


@pytest.mark.parametrize("frames", [61, 34])
@pytest.mark.parametrize(("kernel", "gap"), [(15, 5), (3, 1), (9, 7)])
def test_blind_conv_never_sees_its_own_frames(kernel: int, gap: int, frames: int) -> None:
    conv = randomise(BlindConv(6, 4, kernel, gap))
    seen = reach(conv, 30, 6, 61, length_mask(torch.tensor([frames]), 61))
    half, blind = kernel // 2, (gap - 1) // 2
    assert seen == [i for i in range(30 - half, 31 + half) if abs(i - 30) > blind and i < frames]


def test_global_response_norm_equals_its_formula_over_valid_frames() -> None:
    norm = randomise(GlobalResponseNorm(5, 1e-6))
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
    piece=st.sampled_from(["convnext", "rotary", "sinusoidal", "fusion", "blind", "up2"]),
)
def test_padding_never_reaches_a_clip(valid: int, extra: int, piece: str) -> None:
    makers: dict[str, Callable[[], nn.Module]] = {
        "convnext": block,
        "rotary": transformer,
        "sinusoidal": lambda: transformer("sinusoidal"),
        "fusion": lambda: Fusion(8, 3, 2, 0.1),
        "blind": lambda: BlindConv(8, 8, 5, 3),
        "up2": lambda: Up2(8, 6, 4, 3),
    }
    module = makers[piece]()
    randomise(module)
    x = noise(2, valid + extra, 8)
    x[0, valid:] = 1e3
    mask = length_mask(torch.tensor([valid, valid + extra]), valid + extra)
    inputs = (x, x.flip(0).roll(1, 0)) if piece == "fusion" else (x,)
    alone = module(*(part[:1, :valid] for part in inputs), mask[:1, :valid])
    batch = module(*inputs, mask)
    torch.testing.assert_close(batch[:1, : alone.shape[1]], alone, rtol=1e-4, atol=1e-4)


def test_convnext_block_equals_numpy_over_valid_frames() -> None:
    module = randomise(block(4, kernel=5))
    x = noise(2, 9, 4)
    got = module(x, length_mask(torch.tensor([9, 6]), 9)).detach().numpy()
    for row, valid in enumerate((9, 6)):
        clip = array(x[row, :valid])
        y = layer_norm(convolve(clip, module.depthwise.conv), module.norm)
        y = gelu(y @ array(module.expand.weight).T + array(module.expand.bias))
        energy = np.sqrt((y**2).sum(axis=0))
        y = array(module.response.gamma) * y * (energy / (energy.mean() + 1e-6)) + array(module.response.beta) + y
        y = y @ array(module.project.weight).T + array(module.project.bias)
        np.testing.assert_allclose(got[row, :valid], clip + y, rtol=1e-4, atol=1e-5)


def test_drop_path_skips_whole_clips_in_training_only() -> None:
    module = randomise(block(drop_path=0.25))
    x, mask = noise(1, 5, 8).expand(400, 5, 8), torch.ones(400, 5, dtype=torch.bool)
    added = (module(x, mask) - x)[0]
    torch.manual_seed(0)
    dropped = module.train()(x, mask) - x
    skipped = dropped.abs().amax(dim=(1, 2)) == 0
    assert 0.18 < skipped.float().mean() < 0.32
    torch.testing.assert_close(dropped[~skipped], (added / 0.75).expand_as(dropped[~skipped]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kernel", "conv", "beyond"), [(2, 1, 0), (4, 1, 1), (4, 3, 2), (6, 5, 4)], ids=lambda value: str(value)
)
def test_up2_lays_two_acoustic_frames_on_each_video_frame(kernel: int, conv: int, beyond: int) -> None:
    module = randomise(Up2(3, 4, kernel, conv))
    mask = torch.ones(1, 12, dtype=torch.bool)
    touched = [frame for frame in range(24) if 5 in reach(module, frame, 3, 12, mask)]
    assert touched == [*range(2 * 5 - beyond, 2 * 5 + 2 + beyond)]


def test_up2_equals_numpy_and_doubles_any_length() -> None:
    module = randomise(Up2(3, 4, 4, 3))
    for length in (1, 2, 7):
        x = noise(1, length, 3)
        spread = np.zeros((2 * length + 2, 4))
        for frame in range(length):
            for tap in range(4):
                spread[2 * frame + tap] += array(x[0, frame]) @ array(module.up.weight)[:, :, tap]
        y = gelu(layer_norm(spread[1:-1] + array(module.up.bias), module.norm))
        got = module(x, torch.ones(1, length, dtype=torch.bool))[0].detach().numpy()
        np.testing.assert_allclose(got, convolve(y, module.conv.conv), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_fusion_equals_numpy(layers: int) -> None:
    module = randomise(Fusion(4, 3, layers, 0.1))
    feature, hidden = noise(1, 6, 4), noise(1, 6, 4, seed=1)
    y = np.concatenate([array(feature[0]), array(hidden[0])], axis=-1)
    for conv, norm in zip(module.convs, module.norms, strict=True):
        assert isinstance(conv, TimeConv)
        assert isinstance(norm, nn.LayerNorm)
        y = gelu(layer_norm(convolve(y, conv.conv), norm))
    got = module(feature, hidden, torch.ones(1, 6, dtype=torch.bool))[0].detach().numpy()
    np.testing.assert_allclose(got, y, rtol=1e-4, atol=1e-5)


def test_rotary_positions_are_relative_and_standard() -> None:
    angles = position_angles(50, 8, torch.device("cpu"))
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


@pytest.mark.parametrize("hidden", [0, 1, 2])
@pytest.mark.parametrize("activation", ["gelu", "tanh"])
def test_masked_predictor_equals_numpy(activation: Literal["gelu", "tanh"], hidden: int) -> None:
    config = EncoderConfig(dim=8, masked_kernel=5, masked_gap=1, masked_hidden=hidden, masked_activation=activation)
    module = randomise(MaskedPredictor(config, 3))
    x = noise(1, 6, 8)
    found = module(x, torch.ones(1, 6, dtype=torch.bool))[0].detach().numpy()
    with torch.no_grad():
        module.conv.conv.weight[:, :, 2] = 0
    bend = np.tanh if activation == "tanh" else gelu
    norm, *linears = (piece for piece in module.head if isinstance(piece, nn.LayerNorm | nn.Linear))
    assert isinstance(norm, nn.LayerNorm)
    y = layer_norm(convolve(array(x[0]), module.conv.conv), norm)
    for linear in linears:
        assert isinstance(linear, nn.Linear)
        y = bend(y) @ array(linear.weight).T + array(linear.bias)
    assert len(linears) == hidden + 1
    np.testing.assert_allclose(found, y, rtol=1e-4, atol=1e-5)


def test_predictor_is_blocks_then_norm_then_head() -> None:
    module = randomise(Predictor(EncoderConfig(dim=8, blocks=2), 3))
    x, mask = noise(2, 6, 8), length_mask(torch.tensor([6, 4]), 6)
    y = x
    for piece in module.blocks:
        y = piece(y, mask)
    norm, _, linear = module.head
    assert isinstance(norm, nn.LayerNorm)
    assert isinstance(linear, nn.Linear)
    expected = layer_norm(array(y), norm) @ array(linear.weight).T + array(linear.bias)
    assert len(module.blocks) == 2
    np.testing.assert_allclose(module(x, mask).detach().numpy(), expected, rtol=1e-4, atol=1e-5)


def test_sinusoids_equal_numpy() -> None:
    expected = np.array(
        [[(np.sin, np.cos)[c % 2](p / 10_000 ** (2 * (c // 2) / 6)) for c in range(6)] for p in range(40)]
    )
    np.testing.assert_allclose(sinusoids(40, 6, torch.device("cpu")).numpy(), expected, atol=1e-5)


def test_sinusoidal_transformer_equals_torch() -> None:
    module = randomise(transformer("sinusoidal"))
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.1, "gelu", batch_first=True, norm_first=True)
    theirs = nn.TransformerEncoder(layer, 2, nn.LayerNorm(8), enable_nested_tensor=False).eval()
    names = {
        "attention_norm": "norm1",
        "qkv.": "self_attn.in_proj_",
        "out": "self_attn.out_proj",
        "ffn_norm": "norm2",
        "ffn.0": "linear1",
        "ffn.3": "linear2",
    }
    state = {}
    for name, value in module.state_dict().items():
        for ours, other in names.items():
            name = name.replace(f".{ours}" if ours.endswith(".") else f".{ours}.", f".{other}" + "." * (ours != "qkv."))
        state[name] = value
    theirs.load_state_dict(state)
    x, mask = noise(2, 9, 8), length_mask(torch.tensor([9, 5]), 9)
    expected = theirs(x + sinusoids(9, 8, x.device), src_key_padding_mask=~mask)
    torch.testing.assert_close(module(x, mask)[mask], expected[mask], rtol=1e-4, atol=1e-5)


def test_rotary_transformer_sees_distances_and_order_but_no_place() -> None:
    x, mask = noise(1, 16, 8), torch.ones(1, 16, dtype=torch.bool)
    mask[:, :7] = False  # the same nine frames, seven places later
    rotary, sinusoidal = randomise(transformer()), randomise(transformer("sinusoidal"))
    late, early = rotary(x, mask)[:, 7:], rotary(x[:, 7:], mask[:, 7:])
    torch.testing.assert_close(late, early, rtol=1e-4, atol=1e-5)
    assert (sinusoidal(x, mask)[:, 7:] - sinusoidal(x[:, 7:], mask[:, 7:])).abs().max() > 1e-2
    assert (rotary(x[:, 7:].flip(1), mask[:, 7:]).flip(1) - early).abs().max() > 1e-2


def test_mean_over_time_counts_valid_frames_only() -> None:
    x = noise(2, 4, 3)
    x[1, 1:] = float("nan")
    found = mean_over_time(x, length_mask(torch.tensor([4, 1]), 4)).numpy()
    np.testing.assert_allclose(found, [x[0].numpy().mean(axis=0), x[1, 0].numpy()], rtol=1e-6)


def test_masked_mean_counts_valid_frames_only() -> None:
    values = torch.tensor([[1.0, 2.0, float("nan")], [3.0, 100.0, 100.0]])
    assert masked_mean(values, length_mask(torch.tensor([2, 1]), 3)).item() == pytest.approx(2.0)

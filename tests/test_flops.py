"""Counts of floating-point operations against numbers worked out by hand, and the measured matrix-product speed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.flops import count_flops, matmul_peak
from model.rehearsal import rehearsal

TYPES = [torch.float32, torch.bfloat16]


def both(module: Callable[[Tensor], Tensor], x: Tensor) -> tuple[float, float]:
    """Forward alone, and forward with backward into the parameters and `x`."""
    x = x.requires_grad_()
    return count_flops(lambda: module(x)), count_flops(lambda: module(x).sum().backward())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("module", "shape", "products"),
    [
        # Multiplications of the forward pass; the backward pass has as many for the input and for the weight.
        (nn.Linear(8, 16), (2, 3, 8), 2 * 3 * 8 * 16),
        (nn.Conv1d(8, 16, 3, padding=1), (2, 8, 10), 2 * 10 * 16 * 8 * 3),
        (nn.Conv1d(8, 16, 3, padding=1, groups=4), (2, 8, 10), 2 * 10 * 16 * 2 * 3),
        (nn.Conv1d(8, 8, 7, padding=3, groups=8), (2, 8, 10), 2 * 10 * 8 * 7),
        (nn.Conv2d(5, 16, 7, stride=4, padding=3), (2, 5, 20, 24), 2 * 5 * 6 * 16 * 5 * 49),
        # Each input value meets each tap of each output channel.
        (nn.ConvTranspose1d(8, 16, 4, stride=2, padding=1), (2, 8, 10), 2 * 10 * 8 * 16 * 4),
        (nn.ConvTranspose1d(8, 16, 4, stride=2, padding=1, groups=2), (2, 8, 10), 2 * 10 * 8 * 8 * 4),
    ],
)
def test_layers(module: nn.Module, shape: tuple[int, ...], products: int, dtype: torch.dtype) -> None:
    assert both(module.to(dtype), torch.randn(shape, dtype=dtype)) == (2 * products, 3 * 2 * products)


def test_gradients_that_nobody_asks_for_are_not_counted() -> None:
    conv, x = nn.Conv1d(8, 16, 3, padding=1, groups=4), torch.randn(2, 8, 10)
    products = 2 * 10 * 16 * 2 * 3
    assert count_flops(lambda: conv(x).sum().backward()) == 2 * 2 * products
    conv.requires_grad_(False)
    assert count_flops(lambda: conv(x)) == 2 * products


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_attention(dtype: torch.dtype, backend: SDPBackend, masked: bool, dropout: float) -> None:
    if dropout and backend == SDPBackend.FLASH_ATTENTION:
        pytest.skip("this kernel has no dropout")
    batch, heads, queries, keys, width = 2, 3, 6, 16, 8
    q = torch.randn(batch, heads, queries, width, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(batch, heads, keys, width, dtype=dtype, requires_grad=True) for _ in range(2))
    mask = torch.rand(batch, 1, 1, keys) < 0.8 if masked else None

    def attend() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)

    products = 2 * batch * heads * queries * keys * width  # q k, and its product with v
    assert count_flops(attend) == 2 * products
    assert count_flops(lambda: attend().sum().backward()) == 3 * 2 * products


def test_autocast_changes_no_count() -> None:
    layer, x = nn.Linear(8, 16), torch.randn(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert both(layer, x) == (2 * 2 * 8 * 16, 3 * 2 * 2 * 8 * 16)


@pytest.mark.parametrize("dtype", TYPES)
def test_no_product_is_faster_than_the_peak(dtype: torch.dtype) -> None:
    peak = matmul_peak(torch.device("cpu"), dtype, 0.05)
    assert 1e8 < peak < 1e14


def test_a_rehearsal_leaves_no_trace() -> None:
    network = nn.Sequential(nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    x = torch.randn(4, 2, 9)
    network(x).sum().backward()
    buffers = {name: value.clone() for name, value in network.named_buffers()}
    gradients = {name: value.grad.clone() for name, value in network.named_parameters() if value.grad is not None}
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    with rehearsal(network):
        network(x).square().sum().backward()
        assert not torch.equal(network[1].get_buffer("running_mean"), buffers["1.running_mean"])
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(value, buffers[name]) for name, value in network.named_buffers())
    assert len(gradients) == 4
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradients[name])

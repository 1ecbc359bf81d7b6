"""Floating-point operations of a training step, and the matrix-product speed that they are held against.

A multiplication and an addition are two operations. Counted are matrix products, convolutions and attention, forward
and backward, as the mathematics needs them: what a kernel computes twice to save memory counts once, as in the model
FLOPs utilisation of PaLM (Chowdhery et al. 2022).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

SIZES = {"cpu": (512, 1024, 2048), "cuda": (2048, 4096, 8192)}
"""Sides of the square matrices that `matmul_peak` tries."""

Shape = Sequence[int]


def count_flops(step: Callable[[], object]) -> float:
    """Floating-point operations of one call of `step`, which runs here once. Compiled parts would not be seen.

    Wrap it in `model.rehearsal.rehearsal` where it must leave no trace in a network.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    with counter:
        step()
    return float(counter.get_total_flops())


def matmul_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Floating-point operations per second of the fastest square matrix product in `dtype` that was seen.

    Takes about `seconds`, on a slow processor longer: each size runs at least twice. float32 runs as torch is set
    (`torch.set_float32_matmul_precision`).
    """
    best = 0.0
    sizes = SIZES[device.type]
    for size in sizes:
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        torch.mm(a, b)
        _wait(device)
        begin = time.perf_counter()
        while True:
            start = time.perf_counter()
            torch.mm(a, b)
            _wait(device)
            now = time.perf_counter()
            best = max(best, 2.0 * size**3 / (now - start))
            if now - begin > seconds / len(sizes):
                break
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Scores, and their product with the values; a mask saves nothing."""
    *several, queries, width = query
    return 2 * prod(several) * queries * key[-2] * (width + value[-1])


def _attention_backward(grad: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Two products for each of the forward's; the scores that fused kernels compute again do not count."""
    return 2 * _attention(query, key, value)


def _convolution_backward(
    grad: Shape,
    inputs: Shape,
    weight: Shape,
    bias: Shape | None,
    stride: object,
    padding: object,
    dilation: object,
    transposed: bool,
    output_padding: object,
    groups: int,
    output_mask: Sequence[bool],
    *_: Any,
    **__: Any,
) -> int:
    """The forward's operations for each of the two gradients that is asked for (torch's own formula forgets that a
    weight's gradient has groups)."""
    places = inputs if transposed else grad
    return 2 * places[0] * prod(places[2:]) * prod(weight) * (int(output_mask[0]) + int(output_mask[1]))


_aten = torch.ops.aten
_FORMULAS: dict[Any, Any] = {
    _aten.convolution_backward: _convolution_backward,
    # torch counts the kernel of the CPU not at all, and those of the GPU with what they compute again.
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    _aten._scaled_dot_product_flash_attention_backward: _attention_backward,
    _aten._scaled_dot_product_efficient_attention_backward: _attention_backward,
    _aten._scaled_dot_product_cudnn_attention_backward: _attention_backward,
}

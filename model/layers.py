"""Pieces that several networks share. Sequences are [B, T, C], masks [B, T] bool, True on valid frames.

Every piece that mixes frames masks its own input, so a clip's result is the same alone and padded in a batch.
What comes out on padded frames is finite and means nothing.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def length_mask(frames: Tensor, length: int) -> Tensor:
    """Boolean mask [B, length], True on the first `frames[b]` positions; `frames` int64 [B]."""
    return torch.arange(length, device=frames.device)[None, :] < frames[:, None]


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` [B, T] over valid frames as a float32 scalar; 0 where no frame is valid."""
    return values.float().masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)


def mean_over_time(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of a sequence [B, T, C] over each clip's valid frames: float32 [B, C]."""
    total = x.float().masked_fill(~mask[..., None], 0.0).sum(dim=1)
    return total / mask.sum(dim=1, keepdim=True).clamp(min=1)


class TimeConv(nn.Module):
    """Conv1d over time with 'same' padding for sequences [B, T, C]; padded frames enter as zeros."""

    def __init__(self, inputs: int, outputs: int, kernel: int, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, kernel, padding=kernel // 2, groups=groups)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.conv((x * mask[..., None]).transpose(1, 2)).transpose(1, 2)


class BlindConv(TimeConv):
    """Convolution whose middle `gap` taps are zero: frame i comes from its neighbours, never from itself.

    The masked convolution block of non-autoregressive predictive coding (Liu et al. 2021). With kernel 15 and
    gap 5, output frame i depends on frames i-7..i-3 and i+3..i+7.
    """

    taps: Tensor

    def __init__(self, inputs: int, outputs: int, kernel: int, gap: int) -> None:
        super().__init__(inputs, outputs, kernel)
        taps = torch.ones(kernel)
        taps[(kernel - gap) // 2 : (kernel + gap) // 2] = 0.0
        self.register_buffer("taps", taps, persistent=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = (x * mask[..., None]).transpose(1, 2)
        x = F.conv1d(x, self.conv.weight * self.taps, self.conv.bias, padding=self.conv.padding[0])
        return x.transpose(1, 2)


class Up2(nn.Module):
    """Video rate to acoustic rate, [B, F, inputs] -> [B, 2F, outputs]: transposed and plain convolution.

    Acoustic frames 2i and 2i + 1 lie on video frame i; an even `kernel` of 2 + 2n reaches n acoustic frames beyond.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, conv: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose1d(inputs, outputs, kernel, stride=2, padding=kernel // 2 - 1)
        self.norm = nn.LayerNorm(outputs)
        self.conv = TimeConv(outputs, outputs, conv)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """`mask` [B, F] is at the video rate."""
        x = self.up((x * mask[..., None]).transpose(1, 2)).transpose(1, 2)
        return self.conv(F.gelu(self.norm(x)), mask.repeat_interleave(2, dim=1))


class Fusion(nn.Module):
    """Two sequences of width `dim` into one: channels side by side, then convolution blocks."""

    def __init__(self, dim: int, kernel: int, layers: int, dropout: float) -> None:
        super().__init__()
        widths = [2 * dim] + [dim] * (layers - 1)
        self.convs = nn.ModuleList(TimeConv(width, dim, kernel) for width in widths)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in widths)
        self.dropout = nn.Dropout(dropout)

    def forward(self, feature: Tensor, hidden: Tensor, mask: Tensor) -> Tensor:
        x = torch.cat([feature, hidden], dim=-1)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = self.dropout(F.gelu(norm(conv(x, mask))))
        return x


class GlobalResponseNorm(nn.Module):
    """GRN of ConvNeXt V2 (Woo et al. 2023) over time: channels compete by their norm over valid frames."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.gamma = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        # A sum of squares over the sequence: float32, whatever the precision around it.
        norm = torch.linalg.vector_norm(x.float() * mask[..., None], dim=1, keepdim=True)
        response = (norm / (norm.mean(dim=-1, keepdim=True) + self.eps)).to(x.dtype)
        return self.gamma * (x * response) + self.beta + x


class ConvNeXtBlock(nn.Module):
    """ConvNeXt-V2 block in one dimension: depthwise convolution, pointwise bottleneck with GRN, residual.

    With stochastic depth (Huang et al. 2016): in training a clip skips the block with chance `drop_path`, and what the
    block adds to the others is divided by the chance to stay.
    """

    def __init__(
        self, dim: int, kernel: int, expansion: int, norm_eps: float, grn_eps: float, drop_path: float
    ) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.depthwise = TimeConv(dim, dim, kernel, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.expand = nn.Linear(dim, expansion * dim)
        self.response = GlobalResponseNorm(expansion * dim, grn_eps)
        self.project = nn.Linear(expansion * dim, dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = F.gelu(self.expand(self.norm(self.depthwise(x, mask))))
        y = self.project(self.response(y, mask))
        if self.training and self.drop_path:
            y = y * F.dropout(torch.ones(len(y), 1, 1, device=y.device), self.drop_path)
        return x + y


class Transformer(nn.Module):
    """Pre-norm Transformer with a final LayerNorm: [B, T, dim] -> [B, T, dim].

    Rotary positions (Su et al. 2021) are relative, so lengths beyond those seen in training work; sinusoidal ones
    (Vaswani et al. 2017) are added to the input.
    """

    def __init__(
        self,
        dim: int,
        layers: int,
        heads: int,
        ffn: int,
        dropout: float,
        attention_dropout: float,
        positions: Literal["rotary", "sinusoidal"],
    ) -> None:
        super().__init__()
        self.rotary, self.head_dim = positions == "rotary", dim // heads
        self.layers = nn.ModuleList(
            TransformerLayer(dim, heads, ffn, dropout, attention_dropout) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        rotation = None
        if self.rotary:
            rotation = position_angles(x.shape[1], self.head_dim, x.device)
        else:
            x = x + sinusoids(x.shape[1], x.shape[2], x.device)
        for layer in self.layers:
            x = layer(x, mask, rotation)
        return self.norm(x)


class TransformerLayer(nn.Module):
    """x += attention(norm(x)); x += feed-forward(norm(x))."""

    def __init__(self, dim: int, heads: int, ffn: int, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout, self.attention_dropout = heads, dropout, attention_dropout
        self.attention_norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.ffn_norm = nn.LayerNorm(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn), nn.GELU(), nn.Dropout(dropout), nn.Linear(ffn, dim))

    def forward(self, x: Tensor, mask: Tensor, rotation: Tensor | None) -> Tensor:
        q, k, v = self.qkv(self.attention_norm(x)).chunk(3, dim=-1)
        q, k, v = (split_heads(part, self.heads) for part in (q, k, v))
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        y = attend(q, k, v, mask, self.attention_dropout if self.training else 0.0)
        x = x + F.dropout(self.out(y), self.dropout, self.training)
        return x + F.dropout(self.ffn(self.ffn_norm(x)), self.dropout, self.training)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, heads * d] -> [B, heads, T, d]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout: float) -> Tensor:
    """Attention of [B, heads, T, d] over the keys that `mask` [B, T] calls valid -> [B, T, heads * d]."""
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :], dropout_p=dropout)
    return y.transpose(1, 2).flatten(2)


def position_angles(length: int, dim: int, device: torch.device) -> Tensor:
    """Angles [length, dim / 2], float32: position times 10000^(-2i/dim)."""
    rates = 10_000.0 ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
    return torch.arange(length, device=device, dtype=torch.float32)[:, None] * rates


def sinusoids(length: int, dim: int, device: torch.device) -> Tensor:
    """Table [length, dim], float32: channels 2i and 2i + 1 are sine and cosine of `position_angles`."""
    angles = position_angles(length, dim, device)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn the pairs (x[i], x[i + d/2]) of [B, heads, T, d] by `angles` [T, d/2]."""
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)

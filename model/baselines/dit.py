"""Diffusion Transformer (Peebles and Xie 2023) over time, which predicts the velocity of the flow."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.layers import attend, position_angles, rotate, split_heads
from model.transformer_config import DiTConfig
from model.unet import time_embedding


class DiT(nn.Module):
    """velocity(x, t, condition, mask): noisy mel [B, bins, T] and condition [B, W, T] to the velocity [B, bins, T].

    The condition lies beside the mel in every frame; the time enters by adaLN-Zero.
    """

    def __init__(self, config: DiTConfig, bins: int, condition: int) -> None:
        super().__init__()
        dim = config.dim
        self.dim, self.head_dim = dim, dim // config.heads
        self.time = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU())
        self.inputs = nn.Linear(bins + condition, dim)
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.layers))
        self.modulation = zeroed(nn.Linear(dim, 2 * dim))
        self.head = zeroed(nn.Linear(dim, bins))

    def forward(self, x: Tensor, t: Tensor, condition: Tensor, mask: Tensor) -> Tensor:
        """`t` float32 [B] in [0, 1]; `mask` bool [B, T]. Zero on padded frames."""
        time = self.time(time_embedding(t, self.dim))
        rotation = position_angles(x.shape[2], self.head_dim, x.device)
        y = self.inputs(torch.cat([x, condition], dim=1).transpose(1, 2))
        for block in self.blocks:
            y = block(y, time, mask, rotation)
        shift, scale = self.modulation(time)[:, None].chunk(2, dim=-1)
        return self.head(modulated(y, shift, scale)).transpose(1, 2) * mask[:, None]


class DiTBlock(nn.Module):
    """Attention and feed-forward part, each shifted, scaled and gated by the time. Gates begin at zero: the block
    is then the identity."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim = config.dim
        self.heads, self.dropout = config.heads, config.dropout
        self.modulation = zeroed(nn.Linear(dim, 6 * dim))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.ffn = nn.Sequential(nn.Linear(dim, config.ffn), nn.GELU("tanh"), nn.Linear(config.ffn, dim))

    def forward(self, x: Tensor, time: Tensor, mask: Tensor, rotation: Tensor) -> Tensor:
        """`x` [B, T, dim]; `time` [B, dim]; `rotation` angles [T, dim / heads / 2] of `position_angles`."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(time)[:, None].chunk(6, dim=-1)
        parts = self.qkv(modulated(x, shift1, scale1)).chunk(3, dim=-1)
        q, k, v = (split_heads(part, self.heads) for part in parts)
        dropout = self.dropout if self.training else 0.0
        y = self.out(attend(rotate(q, rotation), rotate(k, rotation), v, mask, dropout))
        x = x + gate1 * F.dropout(y, dropout)
        return x + gate2 * self.ffn(modulated(x, shift2, scale2))


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without parameters, then scaled by 1 + `scale` and shifted: adaptive LayerNorm."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def zeroed(layer: nn.Linear) -> nn.Linear:
    """The layer, with weight and bias zero."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer

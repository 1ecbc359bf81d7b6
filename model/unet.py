"""U-Net over time that predicts the velocity of the flow, in the shape of the Matcha-TTS decoder (Mehta et al. 2024).

It differs from the published code where padding is concerned: attention takes a boolean mask instead of adding 0 or 1
to its scores, and GroupNorm's statistics are those of the valid frames.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import DecoderConfig
from model.layers import attend, split_heads

GROUPS = 8
TIME_SCALE = 1000.0


class UNet(nn.Module):
    """velocity(x, t, mu, mask): noisy mel and its mean [B, bins, T], T even, to the velocity [B, bins, T].

    Time is halved once, between the two levels. 11.01 M parameters with the default configuration.
    """

    def __init__(self, config: DecoderConfig, bins: int = 80) -> None:
        super().__init__()
        first, second = config.channels
        time_dim = 4 * first
        self.time = nn.Sequential(nn.Linear(2 * bins, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim))
        self.down1 = Level(config, 2 * bins, first, time_dim, config.blocks)
        self.halve = nn.Conv1d(first, first, 3, stride=2, padding=1)
        self.down2 = Level(config, first, second, time_dim, config.blocks)
        self.bottom = nn.Conv1d(second, second, 3, padding=1)
        self.middle = Level(config, second, second, time_dim, config.mid_blocks)
        self.up2 = Level(config, 2 * second, first, time_dim, config.blocks)
        self.stretch = nn.ConvTranspose1d(first, first, 4, stride=2, padding=1)
        self.up1 = Level(config, 2 * first, first, time_dim, config.blocks)
        self.top = nn.Conv1d(first, first, 3, padding=1)
        self.final = ConvBlock(first, first)
        self.head = nn.Conv1d(first, bins, 1)
        self.apply(_initialise)
        self.residual = config.residual
        if self.residual:
            nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor, t: Tensor, mu: Tensor, mask: Tensor) -> Tensor:
        """`t` float32 [B] in [0, 1]; `mask` bool [B, T], valid lengths even. Zero on padded frames."""
        time = self.time(time_embedding(t, 2 * x.shape[1]))
        half = mask[:, ::2]
        skip1 = self.down1(torch.cat([x, mu], dim=1), time, mask)
        skip2 = self.down2(self.halve(skip1 * mask[:, None]), time, half)
        y = self.middle(self.bottom(skip2 * half[:, None]), time, half)
        y = self.up2(torch.cat([y, skip2], dim=1), time, half)
        y = self.up1(torch.cat([self.stretch(y * half[:, None]), skip1], dim=1), time, mask)
        y = self.final(self.top(y * mask[:, None]), mask)
        velocity = self.head(y)
        if self.residual:
            velocity = velocity + (mu - x)
        return velocity * mask[:, None]


def time_embedding(t: Tensor, dim: int) -> Tensor:
    """Sines, then cosines of 1000 t at dim/2 rates from 1 down to 1e-4: [B] -> [B, dim], float32."""
    half = dim // 2
    rates = torch.exp(torch.arange(half, device=t.device) * (-math.log(10_000.0) / (half - 1)))
    angles = TIME_SCALE * t.float()[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class Level(nn.Module):
    """`blocks` pairs of a residual block and a Transformer block at one rate: [B, inputs, T] -> [B, outputs, T]."""

    def __init__(self, config: DecoderConfig, inputs: int, outputs: int, time_dim: int, blocks: int) -> None:
        super().__init__()
        self.residuals = nn.ModuleList(
            ResidualBlock(inputs if block == 0 else outputs, outputs, time_dim) for block in range(blocks)
        )
        self.transformers = nn.ModuleList(TransformerBlock(config, outputs) for _ in range(blocks))

    def forward(self, x: Tensor, time: Tensor, mask: Tensor) -> Tensor:
        for residual, transformer in zip(self.residuals, self.transformers, strict=True):
            x = transformer(residual(x, time, mask), mask)
        return x


class ResidualBlock(nn.Module):
    """Two convolution blocks with the time added between them, and a 1x1 convolution beside them."""

    def __init__(self, inputs: int, outputs: int, time_dim: int) -> None:
        super().__init__()
        self.block1 = ConvBlock(inputs, outputs)
        self.time = nn.Linear(time_dim, outputs)
        self.block2 = ConvBlock(outputs, outputs)
        self.shortcut = nn.Conv1d(inputs, outputs, 1)

    def forward(self, x: Tensor, time: Tensor, mask: Tensor) -> Tensor:
        y = self.block1(x, mask) + self.time(F.mish(time))[..., None]
        return self.block2(y, mask) + self.shortcut(x * mask[:, None])


class ConvBlock(nn.Module):
    """Convolution, GroupNorm and Mish; zero on padded frames."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, 3, padding=1)
        self.norm = MaskedGroupNorm(outputs)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return F.mish(self.norm(self.conv(x * mask[:, None]), mask)) * mask[:, None]


class MaskedGroupNorm(nn.Module):
    """GroupNorm of [B, channels, T] with mean and variance over the valid frames, in float32."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        groups = x.float().unflatten(1, (GROUPS, -1))
        valid = mask[:, None, None]
        count = valid.sum(dim=-1, keepdim=True).clamp(min=1) * groups.shape[2]
        mean = (groups * valid).sum(dim=(2, 3), keepdim=True) / count
        centred = (groups - mean) * valid
        variance = centred.square().sum(dim=(2, 3), keepdim=True) / count
        y = (centred * torch.rsqrt(variance + 1e-5)).flatten(1, 2)
        return y * self.weight[:, None] + self.bias[:, None]


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and feed-forward with SnakeBeta: [B, channels, T] -> the same. No positions."""

    def __init__(self, config: DecoderConfig, channels: int) -> None:
        super().__init__()
        inner = config.heads * config.head_dim
        self.heads = config.heads
        self.attention_norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * inner, bias=False)
        self.out = nn.Sequential(nn.Linear(inner, channels), nn.Dropout(config.dropout))
        self.ffn_norm = nn.LayerNorm(channels)
        self.ffn = nn.Sequential(
            nn.Linear(channels, config.ffn * channels),
            SnakeBeta(config.ffn * channels),
            nn.Dropout(config.dropout),
            nn.Linear(config.ffn * channels, channels),
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(self.attention_norm(x)).chunk(3, dim=-1))
        x = x + self.out(attend(q, k, v, mask, 0.0))
        return (x + self.ffn(self.ffn_norm(x))).transpose(1, 2)


class SnakeBeta(nn.Module):
    """y + sin^2(y exp(a)) / exp(b), with a and b per channel, zero at the start (BigVGAN, Lee et al. 2023)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + (x * self.alpha.exp()).sin().square() / (self.beta.exp() + 1e-9)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv1d | nn.Linear):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)

"""Conformer (Gulati et al. 2020) over sequences [B, T, dim] with a mask [B, T]."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.layers import TimeConv, attend, position_angles, rotate, split_heads
from model.transformer_config import ConformerConfig


class Conformer(nn.Module):
    """Blocks of half a feed-forward part, attention, convolution and the other half: [B, T, dim] -> [B, T, dim]."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        self.head_dim = config.dim // config.heads
        self.blocks = nn.ModuleList(ConformerBlock(config) for _ in range(config.layers))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        rotation = position_angles(x.shape[1], self.head_dim, x.device)
        for block in self.blocks:
            x = block(x, mask, rotation)
        return x


class ConformerBlock(nn.Module):
    """One block. Positions are rotary in place of Transformer-XL's, and the convolution is followed by a LayerNorm in
    place of the BatchNorm, whose statistics padded frames would enter."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        dim = config.dim
        self.heads, self.dropout = config.heads, config.dropout
        self.before, self.after = (FeedForward(dim, config.ffn, config.dropout) for _ in range(2))
        self.attention_norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.conv_norm = nn.LayerNorm(dim)
        self.gate = nn.Linear(dim, 2 * dim)
        self.depthwise = TimeConv(dim, dim, config.kernel, groups=dim)
        self.depthwise_norm = nn.LayerNorm(dim)
        self.pointwise = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, mask: Tensor, rotation: Tensor) -> Tensor:
        """`rotation`: angles [T, dim / heads / 2] of `position_angles`."""
        x = x + 0.5 * self.before(x)
        x = x + self._dropped(self.out(self._attention(self.attention_norm(x), mask, rotation)))
        y = self.depthwise(F.glu(self.gate(self.conv_norm(x)), dim=-1), mask)
        x = x + self._dropped(self.pointwise(F.silu(self.depthwise_norm(y))))
        x = x + 0.5 * self.after(x)
        return self.norm(x)

    def _attention(self, x: Tensor, mask: Tensor, rotation: Tensor) -> Tensor:
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        return attend(rotate(q, rotation), rotate(k, rotation), v, mask, self.dropout if self.training else 0.0)

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class FeedForward(nn.Sequential):
    """LayerNorm, two linear layers with a swish between them, dropout behind each."""

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__(
            nn.LayerNorm(dim),
            nn.Linear(dim, hidden),
            nn.SiLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, dim),
            nn.Dropout(dropout),
        )


def beside(x: Tensor, vector: Tensor) -> Tensor:
    """A clip's vector [B, W] beside every frame of [B, T, C]: [B, T, C + W]."""
    return torch.cat([x, vector[:, None].expand(-1, x.shape[1], -1).to(x.dtype)], dim=-1)

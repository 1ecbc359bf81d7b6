"""AV-HuBERT, video path (Shi et al. 2022): lip images to one feature per video frame.

`AVHubert` names its modules so that its `state_dict` has the keys of the public checkpoints. `LipEncoder` wraps it
with the learnable weighted sum over layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import LipEncoderConfig
from model.layers import attend, split_heads
from model.lip_weights import load_public


class LipEncoder(nn.Module):
    """AV-HuBERT and the weighted sum over its layers: lips [B, 1, F, 88, 88] -> [B, F, dim], padding zero.

    The sum takes the outputs of all layers, the last one after the final LayerNorm (and the input of the first,
    if `include_input`), under a softmax of logits that start equal. With `weighted_sum` False it is the last
    state alone.
    """

    def __init__(self, config: LipEncoderConfig, weighted_sum: bool = True) -> None:
        super().__init__()
        self.config = config
        self.network = AVHubert(config)
        self.logits = nn.Parameter(torch.zeros(config.layers + config.include_input)) if weighted_sum else None
        if config.frozen:
            self.network.requires_grad_(False)
            self.network.eval()

    def train(self, mode: bool = True) -> LipEncoder:
        """As `nn.Module.train`, except that a frozen network stays in evaluation mode."""
        super().train(mode)
        if self.config.frozen:
            self.network.eval()
        return self

    def forward(self, lips: Tensor, mask: Tensor) -> Tensor:
        """`lips` float32 normalised, `mask` bool [B, F]. The sum is float32."""
        states = self.network.states(lips, mask)
        if not self.config.include_input:
            next(states)
        total = torch.zeros((), device=lips.device)
        if self.logits is None:
            for state in states:
                total = self._scale(state)
        else:
            # Summed while the layers run: without gradients one state lives at a time.
            for weight, state in zip(self.logits.softmax(0), states, strict=True):
                total = total + weight * self._scale(state).float()
        return total * mask[..., None]

    def _scale(self, state: Tensor) -> Tensor:
        return F.layer_norm(state, state.shape[-1:]) if self.config.normalize else state

    def load_public(self, path: Path) -> None:
        """Load public AV-HuBERT weights, as `model.lip_weights.load_public`. Raises UserError: not this network's."""
        load_public(self.network, path)


class AVHubert(nn.Module):
    """The network as published, without its audio branch: the audio half of the fused features is zero."""

    def __init__(self, config: LipEncoderConfig) -> None:
        super().__init__()
        self.dim, self.dropout = config.dim, config.dropout
        self.feature_extractor_video = VideoExtractor(config)
        self.layer_norm = nn.LayerNorm(2 * config.dim)
        self.post_extract_proj = nn.Linear(2 * config.dim, config.dim)
        self.encoder = Encoder(config)

    def states(self, lips: Tensor, mask: Tensor) -> Iterator[Tensor]:
        """Input of the first layer, then each layer's output, the last after the final LayerNorm; [B, F, dim]."""
        video = self.feature_extractor_video(lips, mask)
        # Zeros in place of the projected audio, not a projection of zeros; the halves lie [audio, video].
        fused = self.layer_norm(torch.cat([torch.zeros_like(video), video], dim=-1))
        x = F.dropout(self.post_extract_proj(fused), self.dropout, self.training)
        yield from self.encoder(x, mask)


class VideoExtractor(nn.Module):
    """ResNet with a 3-D stem and a projection: [B, 1, F, H, W] -> [B, F, dim]."""

    def __init__(self, config: LipEncoderConfig) -> None:
        super().__init__()
        self.resnet = ResNet(config)
        self.proj = nn.Linear(config.trunk[-1], config.dim)

    def forward(self, lips: Tensor, mask: Tensor) -> Tensor:
        return self.proj(self.resnet(lips, mask))


class ResNet(nn.Module):
    """3-D convolution over 5 frames, then ResNet basic blocks on each frame, averaged over the image.

    Frames are folded into the batch ahead of the stem, each with its two neighbours on either side as channels:
    a 3-D convolution with time stride 1 is that 2-D convolution. So in training padded frames are left out
    altogether and never enter a BatchNorm statistic. Beyond a clip's ends the stem sees zeros, as in a clip alone.
    """

    def __init__(self, config: LipEncoderConfig) -> None:
        super().__init__()
        self.stride, self.channels = config.stem_stride, config.trunk[-1]
        self.frontend3D = nn.Sequential(
            nn.Conv3d(1, config.stem, (5, 7, 7), padding=(2, 3, 3), bias=False),
            nn.BatchNorm2d(config.stem),
            nn.PReLU(config.stem),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        self.trunk = nn.Sequential()
        width = config.stem
        for level, channels in enumerate(config.trunk):
            blocks = [
                BasicBlock(width if block == 0 else channels, channels, stride=2 if level and block == 0 else 1)
                for block in range(config.trunk_blocks)
            ]
            self.trunk.add_module(f"layer{level + 1}", nn.Sequential(*blocks))
            width = channels

    def forward(self, lips: Tensor, mask: Tensor) -> Tensor:
        padded = F.pad(lips[:, 0] * mask[..., None, None], (0, 0, 0, 0, 2, 2))
        windows = padded.unfold(1, 5, 1).movedim(-1, 2)
        if not self.training:
            return self._frames(windows.flatten(0, 1)).unflatten(0, mask.shape)
        features = self._frames(windows[mask])
        return features.new_zeros(*mask.shape, self.channels).masked_scatter(mask[..., None], features)

    def _frames(self, windows: Tensor) -> Tensor:
        """[n, 5, H, W] -> [n, channels]."""
        x = F.conv2d(windows, self.frontend3D.get_parameter("0.weight").squeeze(1), stride=self.stride, padding=3)
        x = self.frontend3D[1:](x)
        return self.trunk(x).mean(dim=(-2, -1))


class BasicBlock(nn.Module):
    """ResNet basic block with PReLU and a strided 1x1 shortcut where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.PReLU(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.PReLU(outputs)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(y + (x if self.downsample is None else self.downsample(x)))


class Encoder(nn.Module):
    """Positional convolution and pre-norm Transformer layers."""

    def __init__(self, config: LipEncoderConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.pos_conv = nn.Sequential(PositionalConv(config.dim, config.pos_kernel, config.pos_groups), nn.GELU())
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.layers))
        self.layer_norm = nn.LayerNorm(config.dim)

    def forward(self, x: Tensor, mask: Tensor) -> Iterator[Tensor]:
        x = x * mask[..., None]
        x = x + self.pos_conv(x.transpose(1, 2)).transpose(1, 2)
        x = F.dropout(x, self.dropout, self.training)
        yield x
        for layer in self.layers[:-1]:
            x = layer(x, mask)
            yield x
        yield self.layer_norm(self.layers[-1](x, mask))


class PositionalConv(nn.Module):
    """Grouped convolution with weight norm over each tap: weight[:, :, k] = g[k] * v[:, :, k] / |v[:, :, k]|.

    Holds g and v under the checkpoint's names. An even kernel yields one frame too many: the last is dropped.
    """

    def __init__(self, dim: int, kernel: int, groups: int) -> None:
        super().__init__()
        self.kernel, self.groups = kernel, groups
        v = torch.randn(dim, dim // groups, kernel) * (4.0 / (kernel * dim)) ** 0.5
        self.weight_v = nn.Parameter(v)
        self.weight_g = nn.Parameter(torch.linalg.vector_norm(v, dim=(0, 1), keepdim=True))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """[B, dim, F] -> [B, dim, F]."""
        norm = torch.linalg.vector_norm(self.weight_v, dim=(0, 1), keepdim=True)
        weight = self.weight_v * (self.weight_g / norm)
        y = F.conv1d(x, weight, self.bias, padding=self.kernel // 2, groups=self.groups)
        return y[..., : x.shape[-1]]


class EncoderLayer(nn.Module):
    """x += attention(norm(x)); x += fc2(gelu(fc1(norm(x))))."""

    def __init__(self, config: LipEncoderConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.self_attn = SelfAttention(config.dim, config.heads, config.dropout)
        self.self_attn_layer_norm = nn.LayerNorm(config.dim)
        self.fc1 = nn.Linear(config.dim, config.ffn)
        self.fc2 = nn.Linear(config.ffn, config.dim)
        self.final_layer_norm = nn.LayerNorm(config.dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + F.dropout(self.self_attn(self.self_attn_layer_norm(x), mask), self.dropout, self.training)
        y = self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))
        return x + F.dropout(y, self.dropout, self.training)


class SelfAttention(nn.Module):
    """Multi-head self-attention with separate projections; valid keys only."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q_proj, self.k_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.v_proj, self.out_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (split_heads(layer(x), self.heads) for layer in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attend(q, k, v, mask, self.dropout if self.training else 0.0))

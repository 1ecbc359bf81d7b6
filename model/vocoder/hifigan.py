"""HiFi-GAN's generator (Kong et al. 2020) for 16 kHz and a hop of 320 samples.

Tensors keep the names of the public code (conv_pre, ups, resblocks.*.convs1, conv_post), so that its checkpoints load.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from model.vocoder.config import GeneratorConfig
from shards.schema import HOP, MEL_BINS

SLOPE = 0.1
"""Of the leaky ReLUs, but for the last one, which has torch's default 0.01 in the public code."""
ENDS = 7
"""Kernel of the first and the last layer."""
UNIT_DROPOUT = 0.1


class Generator(nn.Module):
    """Log-mel to waveform, optionally with speech units and a speaker embedding beside the mel.

    The multi-input form is that of lip2speech-unit (Choi et al. 2023), where unit embeddings are up-sampled to a mel of
    100 Hz. Here units and mel both come at 50 Hz, so each frame's embedding stands beside its mel as it is.

    Buffers mel_mean and mel_std (0 and 1: none) standardise the log-mel; whoever trains fills them.
    """

    mel_mean: Tensor
    mel_std: Tensor

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("mel_mean", torch.tensor(0.0))
        self.register_buffer("mel_std", torch.tensor(1.0))
        if config.units:
            dim = config.unit_dim
            self.unit_embedding = nn.Sequential(
                nn.Embedding(config.units, dim), nn.GELU(), nn.Dropout(UNIT_DROPOUT), nn.Linear(dim, dim)
            )
        if config.timbre_dim:
            self.speaker_projection = nn.Linear(config.timbre_dim, config.speaker_dim)
        width = config.channels
        self.conv_pre = weight_norm(nn.Conv1d(config.inputs, width, ENDS, padding=ENDS // 2))
        self.ups, self.resblocks = nn.ModuleList(), nn.ModuleList()
        for factor, kernel in zip(config.factors, config.kernels, strict=True):
            layer = nn.ConvTranspose1d(width, width // 2, kernel, factor, padding=(kernel - factor) // 2)
            self.ups.append(weight_norm(layer))
            width //= 2
            for size, dilations in zip(config.block_kernels, config.block_dilations, strict=True):
                self.resblocks.append(ResidualBlock(width, size, dilations, pairs=config.block == 1))
        self.conv_post = weight_norm(nn.Conv1d(width, 1, ENDS, padding=ENDS // 2))

    def forward(self, mel: Tensor, units: Tensor | None = None, speaker: Tensor | None = None) -> Tensor:
        """The wave of a log-mel.

        Args:
            mel: [B, 80, T] in ln amplitude.
            units: int64 [B, T]; needed where `config.units`, otherwise not looked at.
            speaker: [B, timbre_dim]; needed where `config.timbre_dim`, otherwise not looked at.

        Returns:
            [B, 1, 320 T] in -1..1.

        Raises:
            ValueError: the mel has another shape, or an input is missing.
        """
        if mel.dim() != 3 or mel.shape[1] != MEL_BINS:
            raise ValueError(f"expected a mel [B, {MEL_BINS}, T], got {tuple(mel.shape)}")
        parts = [(mel - self.mel_mean) / self.mel_std]
        if self.config.units:
            if units is None:
                raise ValueError("this vocoder reads speech units as well")
            parts.append(self.unit_embedding(units).transpose(1, 2))
        if self.config.timbre_dim:
            if speaker is None:
                raise ValueError("this vocoder reads a speaker embedding as well")
            parts.append(self.speaker_projection(speaker)[:, :, None].expand(-1, -1, mel.shape[2]))
        x = self.conv_pre(torch.cat(parts, dim=1))
        blocks = len(self.config.block_kernels)
        for number, up in enumerate(self.ups):
            x = up(F.leaky_relu(x, SLOPE))
            first, *others = self.resblocks[number * blocks : (number + 1) * blocks]
            total = first(x)
            for block in others:
                total = total + block(x)
            x = total / blocks
        return torch.tanh(self.conv_post(F.leaky_relu(x)).float())

    @property
    def reach(self) -> int:
        """Mel frames on either side of a frame that its 320 samples depend on."""
        config = self.config
        first, last = 0, HOP - 1  # the samples of frame 0, followed back to the frames that they come from
        first, last = first - ENDS // 2, last + ENDS // 2
        for factor, kernel in zip(reversed(config.factors), reversed(config.kernels), strict=True):
            sides = []
            for size, dilations in zip(config.block_kernels, config.block_dilations, strict=True):
                plain = len(dilations) if config.block == 1 else 0
                sides.append((sum(dilations) + plain) * (size // 2))
            first, last = first - max(sides), last + max(sides)
            # Sample n of a transposed convolution is a sum over the inputs i with 0 <= n + padding - factor i < kernel.
            padding = (kernel - factor) // 2
            first, last = -((kernel - 1 - padding - first) // factor), (last + padding) // factor
        return max(-first, last) + ENDS // 2

    def fold(self) -> Generator:
        """Turn weight norm into plain weights, for use after training; returns itself."""
        for module in self.modules():
            if parametrize.is_parametrized(module, "weight"):
                parametrize.remove_parametrizations(module, "weight")
        return self


class ResidualBlock(nn.Module):
    """Dilated convolutions with residual connections: HiFi-GAN's block 1 (`pairs`) or 2. [B, C, T] in and out."""

    def __init__(self, channels: int, kernel: int, dilations: tuple[int, ...], pairs: bool) -> None:
        super().__init__()

        def layers(dilations: tuple[int, ...]) -> nn.ModuleList:
            return nn.ModuleList(
                weight_norm(nn.Conv1d(channels, channels, kernel, dilation=d, padding=d * (kernel // 2)))
                for d in dilations
            )

        self.pairs = pairs
        if pairs:
            self.convs1, self.convs2 = layers(dilations), layers((1,) * len(dilations))
        else:
            self.convs = layers(dilations)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T] -> [B, C, T]."""
        if not self.pairs:
            for conv in self.convs:
                x = x + conv(F.leaky_relu(x, SLOPE))
            return x
        for dilated, plain in zip(self.convs1, self.convs2, strict=True):
            x = x + plain(F.leaky_relu(dilated(F.leaky_relu(x, SLOPE)), SLOPE))
        return x

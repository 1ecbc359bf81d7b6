"""Heads of the hierarchical encoder: ConvNeXt-V2 predictors and their masked auxiliaries."""

from __future__ import annotations

from torch import Tensor, nn

from model.config import EncoderConfig
from model.layers import BlindConv, ConvNeXtBlock


class Predictor(nn.Module):
    """ConvNeXt-V2 blocks, LayerNorm and a linear head: [B, T, dim] -> [B, T, outputs]."""

    def __init__(self, config: EncoderConfig, outputs: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            ConvNeXtBlock(
                config.dim, config.kernel, config.expansion, config.norm_eps, config.grn_eps, config.drop_path
            )
            for _ in range(config.blocks)
        )
        self.head = nn.Sequential(
            nn.LayerNorm(config.dim), nn.Dropout(config.head_dropout), nn.Linear(config.dim, outputs)
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, mask)
        return self.head(x)


class MaskedPredictor(nn.Module):
    """Predicts frame i from its neighbours alone: [B, T, dim] -> [B, T, outputs].

    Everything behind the blind convolution works frame by frame, so the blind spot stays as wide as configured.
    """

    def __init__(self, config: EncoderConfig, outputs: int) -> None:
        super().__init__()
        self.conv = BlindConv(config.dim, config.dim, config.masked_kernel, config.masked_gap)
        activation = {"gelu": nn.GELU, "tanh": nn.Tanh}[config.masked_activation]
        pieces: list[nn.Module] = [nn.LayerNorm(config.dim), activation()]
        for _ in range(config.masked_hidden):
            pieces += [nn.Linear(config.dim, config.dim), activation()]
        self.head = nn.Sequential(*pieces, nn.Linear(config.dim, outputs))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.conv(x, mask))

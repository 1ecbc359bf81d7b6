"""Configuration of the vocoder's networks and of its training."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from shards.config import Config, load_config
from shards.schema import HOP, MEL_BINS

Size = Annotated[int, Field(ge=1)]


class GeneratorConfig(Config):
    """HiFi-GAN's generator; the defaults are those of AdaptVC's public vocoder, 14.45 M parameters.

    speech-resynthesis (Polyak et al. 2021) has factors 5, 4, 4, 2, 2 with kernels 11, 8, 8, 4, 4 for the same hop.

    Attributes:
        factors: of the up-sampling layers; their product is the hop, 320.
        kernels: of the same layers, each its factor plus an even number.
        channels: after the first layer; each up-sampling layer halves them.
        block: HiFi-GAN's residual block 1 (a dilated and a plain convolution in turn) or 2 (dilated ones alone).
        block_kernels: one residual block each, averaged, after each up-sampling layer.
        block_dilations: of each of these blocks.
        units: size of the vocabulary of speech units that the vocoder also reads; 0: it reads none.
        unit_dim: channels of their embedding.
        timbre_dim: width of the speaker embedding that it also reads; 0: it reads none.
        speaker_dim: channels that this embedding is projected to.
    """

    factors: tuple[Size, ...] = Field((10, 8, 2, 2), min_length=1)
    kernels: tuple[Size, ...] = (20, 16, 4, 4)
    channels: int = Field(512, ge=1)
    block: Literal[1, 2] = 1
    block_kernels: tuple[Size, ...] = Field((3, 7, 11), min_length=1)
    block_dilations: tuple[tuple[Size, ...], ...] = ((1, 3, 5), (1, 3, 5), (1, 3, 5))
    units: int = Field(0, ge=0)
    unit_dim: int = Field(128, ge=1)
    timbre_dim: int = Field(0, ge=0)
    speaker_dim: int = Field(128, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> GeneratorConfig:
        if math.prod(self.factors) != HOP:
            raise ValueError(f"factors: their product is {math.prod(self.factors)}, the hop is {HOP}")
        if len(self.kernels) != len(self.factors):
            raise ValueError(f"kernels: {len(self.kernels)} of them for {len(self.factors)} factors")
        if any(
            kernel < factor or (kernel - factor) % 2 for factor, kernel in zip(self.factors, self.kernels, strict=True)
        ):
            raise ValueError("kernels: each must be its factor plus an even number")
        if self.channels % 2 ** len(self.factors):
            raise ValueError(f"channels: {self.channels} cannot be halved {len(self.factors)} times")
        if any(kernel % 2 == 0 for kernel in self.block_kernels):
            raise ValueError("block_kernels: must be odd")
        if len(self.block_dilations) != len(self.block_kernels) or not all(self.block_dilations):
            raise ValueError("block_dilations: one list for each of block_kernels")
        return self

    @property
    def inputs(self) -> int:
        """Channels that enter the first layer."""
        units = self.unit_dim if self.units else 0
        return MEL_BINS + units + (self.speaker_dim if self.timbre_dim else 0)


class DiscriminatorConfig(Config):
    """HiFi-GAN's discriminators; the defaults are theirs.

    Attributes:
        periods: one discriminator each, which sees the wave folded at this many samples.
        period_channels: of their layers; all but the last have stride 3.
        scales: discriminators that see the wave, each after the first at half the rate of the one before.
        scale_channels, scale_strides, scale_kernels, scale_groups: of their layers.
    """

    periods: tuple[Size, ...] = (2, 3, 5, 7, 11)
    period_channels: tuple[Size, ...] = Field((32, 128, 512, 1024, 1024), min_length=2)
    scales: int = Field(3, ge=0)
    scale_channels: tuple[Size, ...] = (128, 128, 256, 512, 1024, 1024, 1024)
    scale_kernels: tuple[Size, ...] = (15, 41, 41, 41, 41, 41, 5)
    scale_strides: tuple[Size, ...] = (1, 2, 2, 4, 4, 1, 1)
    scale_groups: tuple[Size, ...] = (1, 4, 16, 16, 16, 16, 1)

    @model_validator(mode="after")
    def _fits(self) -> DiscriminatorConfig:
        layers = len(self.scale_channels)
        if not self.periods and not self.scales:
            raise ValueError("periods, scales: no discriminator at all")
        if not layers == len(self.scale_kernels) == len(self.scale_strides) == len(self.scale_groups):
            raise ValueError("scale_channels, scale_kernels, scale_strides, scale_groups: must be of one length")
        into = (1, *self.scale_channels)
        if any(a % g or b % g for a, b, g in zip(into[:-1], self.scale_channels, self.scale_groups, strict=True)):
            raise ValueError("scale_groups: must divide the channels on both sides of their layer")
        return self


GENERATORS: dict[str, dict[str, Any]] = {
    "paper": {},
    "tiny": {
        "factors": (10, 8, 4),
        "kernels": (20, 16, 8),
        "channels": 128,
        "block": 2,
        "block_kernels": (3, 7),
        "block_dilations": ((1, 3), (1, 3)),
    },
}
"""Bases for `load_config(GeneratorConfig, base=...)`: AdaptVC's; one that learns in minutes on one core."""

DISCRIMINATORS: dict[str, dict[str, Any]] = {
    "paper": {},
    "tiny": {
        "period_channels": (8, 16, 32, 64, 64),
        "scales": 1,
        "scale_channels": (16, 16, 32, 64, 64),
        "scale_kernels": (15, 41, 41, 41, 5),
        "scale_strides": (1, 4, 4, 4, 1),
        "scale_groups": (1, 4, 4, 4, 1),
    },
}
"""Bases for `load_config(DiscriminatorConfig, base=...)`: HiFi-GAN's; narrow ones to go with the tiny generator."""


def generator_config(size: str, **keys: Any) -> GeneratorConfig:
    """The generator called `size` in `GENERATORS`, with `keys` over it. Raises UserError: an unfit key."""
    return load_config(GeneratorConfig, base={**GENERATORS[size], **keys})


def discriminator_config(size: str, **keys: Any) -> DiscriminatorConfig:
    """The discriminators called `size` in `DISCRIMINATORS`, with `keys` over it. Raises UserError: an unfit key."""
    return load_config(DiscriminatorConfig, base={**DISCRIMINATORS[size], **keys})

"""Changes to what a vocoder is trained on, so that it bears mels that a network predicted and speech of any level.

Blur and noise are those of lip2speech-unit's augmented vocoder (Choi et al. 2023).
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from model.flow import Place
from shards.config import Config
from shards.mel import FLOOR

KERNEL = 9
SIGMA = (0.1, 1.0)


class RobustConfig(Config):
    """What is changed.

    Attributes:
        gain: largest change of level in decibels, up or down, of wave and mel alike.
        blur: share of the clips whose mel is blurred.
        noise: standard deviation of what is added to the log-mel; 1 in lip2speech-unit.
    """

    gain: float = Field(6.0, ge=0)
    blur: float = Field(0.0, ge=0, le=1)
    noise: float = Field(0.0, ge=0)


def roughen(
    wave: Tensor, mel: Tensor, config: RobustConfig, generator: torch.Generator, place: Place | None = None
) -> tuple[Tensor, Tensor]:
    """Change a batch of training segments; with a generator in the same state, always in the same way.

    Args:
        wave: [B, 1, N] within -1..1.
        mel: [B, 80, T] in ln amplitude.
        generator: on the CPU.
        place: of these samples in the step's batch, for which chance is drawn as a whole: a sample then meets the same
            in whatever part of the batch it is. None: they are the whole.

    Returns:
        Wave and mel, shaped as they were. Neither tensor that was given changes.
    """
    place = place or Place(0, len(mel))
    own = slice(place.first, place.first + len(mel))
    # Everything is drawn in any case, so that one setting does not change what another draws.
    gain, chance, sigma = torch.rand(3, place.rows, generator=generator)[:, own].to(mel.device)
    noise = torch.randn(place.rows, *mel.shape[1:], generator=generator)[own].to(mel)
    wave, mel = _louder(wave, mel, (2 * gain - 1) * config.gain)
    if config.blur:
        sigma = SIGMA[0] + (SIGMA[1] - SIGMA[0]) * sigma
        mel = torch.where((chance < config.blur)[:, None, None], blurred(mel, sigma), mel)
    return wave, mel + config.noise * noise


def blurred(mel: Tensor, sigma: Tensor) -> Tensor:
    """A mel [B, 80, T] after a Gaussian of 9 x 9 bins and frames, of one deviation `sigma` [B] for each clip."""
    offsets = torch.arange(KERNEL, device=mel.device) - KERNEL // 2
    bell = torch.softmax(-(offsets**2) / (2 * sigma[:, None].square()), dim=1).to(mel)
    rows, half = len(mel), KERNEL // 2
    edged = F.pad(mel[None], (half,) * 4, "replicate")
    edged = F.conv2d(edged, bell[:, None, :, None], groups=rows)
    return F.conv2d(edged, bell[:, None, None, :], groups=rows)[0]


def _louder(wave: Tensor, mel: Tensor, decibels: Tensor) -> tuple[Tensor, Tensor]:
    """Another level for each clip, but none beyond full scale. Silence, at the floor of the mel, stays there."""
    peak = wave.abs().amax(dim=(1, 2)).clamp(min=1e-9)
    factor = torch.minimum(10 ** (decibels / 20), (1 / peak).clamp(min=1))[:, None, None]
    floor = math.log(FLOOR)
    shifted = (mel + factor.log()).clamp(min=floor)
    return wave * factor, torch.where(mel > floor + 1e-4, shifted, mel)

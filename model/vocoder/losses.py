"""Losses of HiFi-GAN (Kong et al. 2020); all are float32 scalars. The generator minimises

generator_loss + FEATURE_WEIGHT * feature_loss + MEL_WEIGHT * mel_loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from shards.mel import FLOOR, mel_filters

FEATURE_WEIGHT = 2.0
MEL_WEIGHT = 45.0
N_FFT, HOP = 1024, 256
"""Of the mel in the loss, which is another one than that the generator reads."""


def generator_loss(scores: Sequence[Tensor]) -> Tensor:
    """Least-squares loss of the generator (Mao et al. 2017), summed over the discriminators.

    Args:
        scores: of made waves, as `Discriminators` gives them.
    """
    return torch.stack([(1 - score.float()).square().mean() for score in scores]).sum()


def discriminator_loss(real: Sequence[Tensor], made: Sequence[Tensor]) -> Tensor:
    """Least-squares loss of the discriminators: real scores towards 1, those of made waves towards 0; summed."""
    pairs = zip(real, made, strict=True)
    return torch.stack([(1 - r.float()).square().mean() + m.float().square().mean() for r, m in pairs]).sum()


def feature_loss(real: Sequence[Sequence[Tensor]], made: Sequence[Sequence[Tensor]]) -> Tensor:
    """Feature matching: mean absolute differences, summed over layers and discriminators.

    Args:
        real, made: what `Discriminators` gives; no gradient goes into `real`.
    """
    layers = [pair for one, other in zip(real, made, strict=True) for pair in zip(one, other, strict=True)]
    return torch.stack([F.l1_loss(m.float(), r.detach().float()) for r, m in layers]).sum()


def mel_loss(real: Tensor, made: Tensor) -> Tensor:
    """Mean absolute difference of the log-mels of waves [B, 1, N]."""
    return F.l1_loss(loss_mel(made), loss_mel(real))


def loss_mel(wave: Tensor) -> Tensor:
    """The differentiable log-mel of HiFi-GAN's public code at 16 kHz.

    FFT and window 1024, hop 256, reflect padding by 384, 80 Slaney bins of unit area over 0-8000 Hz, ln amplitude.

    Args:
        wave: [B, 1, N], N above 384.

    Returns:
        float32 [B, 80, N // 256].
    """
    window, filters = _tables(wave.device)
    with torch.autocast(wave.device.type, enabled=False):
        padded = F.pad(wave.float(), ((N_FFT - HOP) // 2,) * 2, "reflect")[:, 0]
        spectra = torch.stft(padded, N_FFT, HOP, window=window, center=False, return_complex=True)
        # The root's slope is infinite at zero.
        amplitude = (spectra.real.square() + spectra.imag.square() + 1e-9).sqrt()
        return (filters @ amplitude).clamp(min=FLOOR).log()


@cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.hann_window(N_FFT, device=device), torch.from_numpy(mel_filters("slaney", N_FFT)).float().to(device)

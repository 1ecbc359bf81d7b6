"""Losses of the encoder's attributes and of its mean, all float32 means over valid frames, and their weighted sum."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from model.config import LossConfig
from model.layers import masked_mean


def content_loss(logits: Tensor, units: Tensor, mask: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy of logits [B, T, units] with smoothed labels: (1 - smoothing) target + smoothing uniform (Eq. 1).

    `units` int64 [B, T]; whatever it holds outside `mask` does not count.
    """
    labels = units.masked_fill(~mask, 0)
    each = F.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none", label_smoothing=smoothing)
    return masked_mean(each, mask)


def unit_accuracy(logits: Tensor, units: Tensor, mask: Tensor) -> Tensor:
    """Share of valid frames whose most likely unit is the target's."""
    return masked_mean((logits.argmax(-1) == units).float(), mask)


def timbre_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error over clips and dimensions; both [B, D]."""
    return (predicted.float() - target.float()).abs().mean()


def prosody_loss(predicted: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean absolute error of pitch or energy [B, T] over valid frames."""
    return masked_mean((predicted.float() - target.float()).abs(), mask)


def prior_loss(mu: Tensor, mel: Tensor, mask: Tensor) -> Tensor:
    """Negative log-likelihood per bin of the mel under N(mu, 1) (Eq. 6); both [B, C, T]; at least log(2 pi) / 2."""
    error = torch.where(mask[:, None], mel.float() - mu.float(), 0.0)
    return 0.5 * (error.square().sum() / (mel.shape[1] * mask.sum().clamp(min=1)) + math.log(2 * math.pi))


def mel_loss(mu: Tensor, mel: Tensor, mask: Tensor) -> Tensor:
    """Mean absolute error of a mel per bin over valid frames; both [B, C, T]."""
    error = torch.where(mask[:, None], mu.float() - mel.float(), 0.0)
    return error.abs().sum() / (mel.shape[1] * mask.sum().clamp(min=1))


def total_loss(parts: Mapping[str, Tensor], weights: LossConfig) -> Tensor:
    """Weighted sum of the parts (Eq. 7): those of cfm, prior, mel, content, timbre, pitch and energy that there are.

    Pitch and energy share the weight of prosody, whose loss is their sum.
    """
    scale = {
        "cfm": weights.cfm,
        "prior": weights.prior,
        "mel": weights.mel,
        "content": weights.content,
        "timbre": weights.timbre,
        "pitch": weights.prosody,
        "energy": weights.prosody,
    }
    return torch.stack([scale[name] * value for name, value in parts.items()]).sum()

"""Optimal-transport conditional flow matching (Lipman et al. 2023): path, loss and guided Euler sampling.

Knows no network: `velocity(x, t, mu, mask)` is any function of [B, C, T], [B], [B, C, T] and bool [B, T] to
[B, C, T]. Chance enters by a generator alone, on whose device the numbers are drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from model.config import FlowConfig
from model.windows import WINDOW, Velocity, windowed
from shards.schema import MEL_PER_FRAME

Law = Literal["cosine", "uniform"]


def warp(s: Tensor) -> Tensor:
    """Cosine schedule of times (CosyVoice, Du et al. 2024): t = 1 - cos(pi s / 2), denser near 0."""
    return 1.0 - torch.cos(0.5 * math.pi * s)


def path(noise: Tensor, mel: Tensor, t: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """Point x_t = (1 - (1 - sigma) t) noise + t mel and its velocity mel - (1 - sigma) noise; t is [B]."""
    t = t[:, None, None]
    return (1.0 - (1.0 - sigma) * t) * noise + t * mel, mel - (1.0 - sigma) * noise


def draw_times(config: FlowConfig, count: int, generator: torch.Generator) -> Tensor:
    """Training times float32 [count] in [0, 1), after the configured law."""
    s = torch.rand(count, generator=generator, device=generator.device)
    return warp(s) if config.train_t == "cosine" else s


@dataclass(frozen=True)
class Place:
    """Where a part lies in the whole batch of a step: its first row, and how many rows the whole has."""

    first: int
    rows: int


def flow_loss(
    velocity: Velocity,
    mel: Tensor,
    mu: Tensor,
    mask: Tensor,
    config: FlowConfig,
    generator: torch.Generator,
    place: Place | None = None,
) -> Tensor:
    """Mean squared error of the velocity over valid frames and bins, float32.

    A share `cfg_dropout` of the samples sees zeros for mu, which is the condition that guidance leads away from.

    Args:
        mel: [B, C, T], standardised; mu: [B, C, T], its gradient flows; mask: bool [B, T].
        place: of these samples in the step's batch, for which chance is drawn as a whole: a sample then meets the same
            noise and time, however the batch is split.
    """
    device, place = mel.device, place or Place(0, len(mel))
    own = slice(place.first, place.first + len(mel))
    noise = torch.randn(place.rows, *mel.shape[1:], generator=generator, device=generator.device)[own].to(device)
    t = draw_times(config, place.rows, generator)[own].to(device)
    kept = torch.rand(place.rows, generator=generator, device=generator.device)[own].to(device) >= config.cfg_dropout
    x, target = path(noise, mel.float(), t, config.sigma)
    valid = mask[:, None]
    predicted = velocity(x * valid, t, mu * (kept[:, None, None] & valid), mask).float()
    # Selected, not multiplied: padded frames may hold anything.
    error = torch.where(valid, predicted - target, 0.0)
    return error.square().sum() / (mel.shape[1] * mask.sum().clamp(min=1))


def euler_times(steps: int, law: Law = "cosine") -> Tensor:
    """The `steps` + 1 times of the solver, float32, from 0 to 1, after the given law."""
    times = torch.linspace(0.0, 1.0, steps + 1, dtype=torch.float64)
    return (warp(times) if law == "cosine" else times).float()


@torch.no_grad()
def sample(
    velocity: Velocity,
    mu: Tensor,
    mask: Tensor,
    generator: torch.Generator | Sequence[torch.Generator],
    steps: int = 10,
    guidance: float = 0.7,
    temperature: float = 1.0,
    law: Law = "cosine",
    channels: int | None = None,
) -> Tensor:
    """Integrate from noise times `temperature` to a standardised mel [B, C, T], zero on padded frames.

    With guidance g the velocity is (1 + g) v(x, t, mu) - g v(x, t, 0), both from one doubled batch. Where T is beyond
    `model.windows.WINDOW`, the velocity is that of overlapping windows, along one trajectory from one noise.

    Args:
        generator: of the batch's noise, or one for each clip, whose noise then does not depend on the others.
        channels: C of the mel, where the condition has another number of them than a mean.

    Raises:
        ValueError: `steps` below 1, or a negative guidance or temperature.
    """
    if steps < 1 or guidance < 0 or temperature < 0:
        raise ValueError(
            f"steps {steps} must be positive, guidance {guidance} and temperature {temperature} not negative"
        )
    valid = mask[:, None]
    mu = mu.float() * valid
    if mu.shape[2] > MEL_PER_FRAME * WINDOW:
        velocity = windowed(velocity)
    x = _noise(mu[:, :1].expand(-1, channels or mu.shape[1], -1), mask, generator) * temperature * valid
    times = euler_times(steps, law).tolist()
    for now, then in pairwise(times):
        t = torch.full((len(x),), now, device=x.device)
        if guidance == 0:
            v = velocity(x, t, mu, mask).float()
        else:
            both = velocity(
                torch.cat([x, x]), torch.cat([t, t]), torch.cat([mu, torch.zeros_like(mu)]), torch.cat([mask, mask])
            )
            given, blank = both.float().chunk(2)
            v = (1.0 + guidance) * given - guidance * blank
        x = (x + (then - now) * v) * valid
    return x


def _noise(mu: Tensor, mask: Tensor, generator: torch.Generator | Sequence[torch.Generator]) -> Tensor:
    """Standard normal, of the shape of `mu` and on its device."""
    if isinstance(generator, torch.Generator):
        return torch.randn(mu.shape, generator=generator, device=generator.device).to(mu.device)
    noise = torch.zeros_like(mu)
    for row, (own, length) in enumerate(zip(generator, mask.sum(dim=1).tolist(), strict=True)):
        noise[row, :, :length] = torch.randn(mu.shape[1], length, generator=own, device=own.device)
    return noise

"""Losses against plain numpy; padding never counts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from model import losses
from model.config import LossConfig
from model.layers import length_mask


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


MASK = length_mask(torch.tensor([5, 3]), 5)


def test_content_loss_equals_equation_one() -> None:
    logits = noise(2, 5, 7)
    units = torch.randint(0, 7, (2, 5), generator=torch.Generator().manual_seed(1))
    units[1, 3:] = -100
    alpha, total = 0.9, []
    for row, frames in enumerate((5, 3)):
        for frame in range(frames):
            scores = logits[row, frame].numpy().astype(np.float64)
            log_p = scores - np.log(np.exp(scores).sum())
            total.append(-alpha * log_p[units[row, frame]] - (1 - alpha) * log_p.mean())
    assert losses.content_loss(logits, units, MASK, 0.1).item() == pytest.approx(np.mean(total), rel=1e-5)


def test_content_loss_survives_garbage_in_padding() -> None:
    logits, units = noise(2, 5, 7).requires_grad_(), torch.full((2, 5), 2)
    units[1, 3:] = 999
    losses.content_loss(logits, units, MASK, 0.1).backward()
    assert logits.grad is not None
    assert logits.grad[1, 3:].abs().max() == 0


def test_accuracy_counts_valid_frames() -> None:
    logits = torch.nn.functional.one_hot(torch.tensor([[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]), 5).float()
    units = torch.tensor([[0, 1, 2, 0, 0], [0, 0, 0, 3, 4]])
    assert losses.unit_accuracy(logits, units, MASK).item() == pytest.approx(4 / 8)


def test_timbre_and_prosody_are_mean_absolute_errors() -> None:
    a, b = noise(2, 5), noise(2, 5, seed=1)
    distance = np.abs(a.numpy() - b.numpy())
    assert losses.timbre_loss(a, b).item() == pytest.approx(distance.mean(), rel=1e-5)
    b[1, 3:] = float("nan")
    assert losses.prosody_loss(a, b, MASK).item() == pytest.approx(distance[MASK.numpy()].mean(), rel=1e-5)


def test_garbage_in_padding_reaches_no_gradient() -> None:
    target = noise(2, 5, seed=1)
    target[1, 3:] = float("nan")
    predicted, mu = noise(2, 5).requires_grad_(), noise(2, 80, 5).requires_grad_()
    (
        losses.prosody_loss(predicted, target, MASK) + losses.prior_loss(mu, target[:, None].expand(2, 80, 5), MASK)
    ).backward()
    for gradient in (predicted.grad, mu.grad):
        assert gradient is not None
        valid = MASK if gradient.ndim == 2 else MASK[:, None].expand_as(gradient)
        assert (gradient[valid] != 0).all()
        assert (gradient[~valid] == 0).all()


def test_prior_is_a_gaussian_likelihood_with_floor() -> None:
    mu, mel = noise(2, 80, 5), noise(2, 80, 5, seed=1)
    density = np.exp(-0.5 * (mel.numpy().astype(np.float64) - mu.numpy()) ** 2) / np.sqrt(2 * np.pi)
    valid = np.broadcast_to(MASK.numpy()[:, None], density.shape)
    assert losses.prior_loss(mu, mel, MASK).item() == pytest.approx(-np.log(density[valid]).mean(), rel=1e-5)
    assert losses.prior_loss(mel, mel, MASK).item() == pytest.approx(0.919, abs=5e-4)
    assert losses.prior_loss(mel, mel, MASK).item() == pytest.approx(0.5 * math.log(2 * math.pi))


def test_total_is_equation_seven() -> None:
    values = {"cfm": 1.0, "prior": 2.0, "content": 4.0, "timbre": 8.0, "pitch": 16.0, "energy": 32.0}
    parts = {name: torch.tensor(value) for name, value in values.items()}
    assert losses.total_loss(parts, LossConfig()).item() == 1 + 2 + 0.5 * (4 + 8 + 16 + 32)
    assert losses.total_loss(parts, LossConfig(prosody=0.0, prior=3.0)).item() == 1 + 6 + 0.5 * (4 + 8)


def test_half_precision_inputs_give_float32_losses() -> None:
    mu, logits = noise(2, 80, 5).bfloat16(), noise(2, 5, 7).bfloat16()
    assert losses.prior_loss(mu, noise(2, 80, 5), MASK).dtype == torch.float32
    assert losses.content_loss(logits, torch.zeros(2, 5, dtype=torch.long), MASK, 0.1).dtype == torch.float32

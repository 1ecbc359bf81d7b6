"""Flow matching against plain numpy, and the solver on equations whose solution is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from model.config import FlowConfig
from model.flow import Place, draw_times, euler_times, flow_loss, path, sample
from model.layers import length_mask


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_path_and_target_equal_numpy() -> None:
    noise, mel = (torch.randn(3, 2, 5, generator=seeded(seed)) for seed in (1, 2))
    t = np.array([0.0, 0.3, 1.0], dtype=np.float32)
    x, target = path(noise, mel, torch.from_numpy(t), sigma=1e-4)
    time, a, b = t[:, None, None].astype(np.float64), noise.numpy(), mel.numpy()
    np.testing.assert_allclose(x.numpy(), (1 - (1 - 1e-4) * time) * a + time * b, atol=1e-6)
    np.testing.assert_allclose(target.numpy(), b - (1 - 1e-4) * a, atol=1e-6)


def test_euler_grid_of_ten_steps() -> None:
    expected = [0, 0.0123, 0.0489, 0.1090, 0.1910, 0.2929, 0.4122, 0.5460, 0.6910, 0.8436, 1]
    np.testing.assert_allclose(euler_times(10).numpy(), expected, atol=5e-5)


def test_uniform_grid() -> None:
    np.testing.assert_allclose(euler_times(4, "uniform").numpy(), [0, 0.25, 0.5, 0.75, 1])


def test_a_part_of_a_batch_meets_the_noise_of_its_place() -> None:
    mel = torch.randn(6, 3, 4, generator=seeded(1))
    mask = torch.ones(6, 4, dtype=torch.bool)

    def met(rows: slice, place: Place | None) -> tuple[Tensor, Tensor, Tensor]:
        seen: list[Tensor] = []

        def watch(x: Tensor, t: Tensor, mu: Tensor, valid: Tensor) -> Tensor:
            seen.extend((x, t, mu))
            return x

        flow_loss(watch, mel[rows], mel[rows], mask[rows], FlowConfig(cfg_dropout=0.5), seeded(2), place)
        return seen[0], seen[1], seen[2]

    whole = met(slice(6), None)
    for first in (0, 2, 4):
        part = met(slice(first, first + 2), Place(first, 6))
        assert all(torch.equal(a, b[first : first + 2]) for a, b in zip(part, whole, strict=True))


def test_training_times_follow_their_law() -> None:
    # Median of 1 - cos(pi s / 2) is 1 - cos(pi / 4); its mean is 1 - 2 / pi.
    cosine = draw_times(FlowConfig(), 40_000, seeded())
    assert cosine.median().item() == pytest.approx(1 - math.cos(math.pi / 4), abs=0.01)
    assert cosine.mean().item() == pytest.approx(1 - 2 / math.pi, abs=0.01)
    uniform = draw_times(FlowConfig(train_t="uniform"), 40_000, seeded())
    assert uniform.median().item() == pytest.approx(0.5, abs=0.01)
    both = torch.cat([cosine, uniform])
    assert both.min() >= 0
    assert both.max() <= 1


def test_loss_is_the_mean_square_over_valid_frames() -> None:
    mel = torch.randn(2, 3, 6, generator=seeded(1))
    mask = length_mask(torch.tensor([6, 2]), 6)
    mel[1, :, 2:] = float("nan")
    seen: dict[str, Tensor] = {}

    def zero(x: Tensor, t: Tensor, mu: Tensor, valid: Tensor) -> Tensor:
        seen.update(x=x, t=t)
        return torch.zeros_like(x)

    config = FlowConfig(sigma=0.0, train_t="uniform")
    loss = flow_loss(zero, mel.nan_to_num(), mel.nan_to_num(), mask, config, seeded(3))
    # x_t and x1 give the noise back, and with it the target of every valid frame.
    t, x1 = seen["t"].numpy()[:, None, None], mel.nan_to_num().numpy()
    target = x1 - (seen["x"].numpy() - t * x1) / (1 - t)
    valid = np.broadcast_to(mask.numpy()[:, None], target.shape)
    assert loss.item() == pytest.approx((target[valid] ** 2).mean(), rel=1e-4)
    dirty = flow_loss(zero, mel, mel.nan_to_num(), mask, config, seeded(3))
    assert dirty.item() == pytest.approx(loss.item(), rel=1e-6)


def test_loss_vanishes_for_the_exact_velocity_and_keeps_the_gradient_of_mu() -> None:
    mel = torch.randn(2, 3, 4, generator=seeded(1))
    mask = torch.ones(2, 4, dtype=torch.bool)

    def exact(x: Tensor, t: Tensor, mu: Tensor, valid: Tensor) -> Tensor:
        return (mu - x) / (1 - t[:, None, None])  # sigma = 0: x1 - x0

    mu = mel.clone().requires_grad_()
    loss = flow_loss(exact, mel, mu, mask, FlowConfig(sigma=0.0, cfg_dropout=0.0), seeded())
    assert loss.item() < 1e-6
    loss.backward()
    assert mu.grad is not None
    other = flow_loss(exact, mel, mel, mask, FlowConfig(sigma=0.0, cfg_dropout=1.0), seeded())
    assert other.item() > 0.1


def test_condition_is_dropped_for_the_configured_share_of_whole_samples() -> None:
    seen: list[Tensor] = []

    def spy(x: Tensor, t: Tensor, mu: Tensor, mask: Tensor) -> Tensor:
        seen.append(mu)
        return x

    mu = torch.ones(4000, 2, 2)
    flow_loss(spy, mu, mu, torch.ones(4000, 2, dtype=torch.bool), FlowConfig(), seeded())
    sums = seen[0].sum(dim=(1, 2))
    assert set(sums.tolist()) == {0.0, 4.0}
    assert (sums == 0).float().mean().item() == pytest.approx(0.1, abs=0.02)


def test_sampling_solves_a_known_equation() -> None:
    # dx/dt = -x: x(1) = x(0) / e, reached as the steps shrink; with 2 steps exactly the product of Euler factors.
    mu, mask = torch.zeros(1, 2, 4), torch.ones(1, 4, dtype=torch.bool)

    def decay(x: Tensor, t: Tensor, mu: Tensor, valid: Tensor) -> Tensor:
        return -x

    start = sample(lambda x, *_: torch.zeros_like(x), mu, mask, seeded(7))
    fine = sample(decay, mu, mask, seeded(7), steps=2000)
    torch.testing.assert_close(fine, start / math.e, rtol=2e-3, atol=1e-5)
    middle = 1 - math.cos(math.pi / 4)
    coarse = sample(decay, mu, mask, seeded(7), steps=2)
    torch.testing.assert_close(coarse, start * (1 - middle) * middle)


@pytest.mark.parametrize("guidance", [0.0, 0.7, 2.0])
def test_guidance_leads_away_from_the_empty_condition(guidance: float) -> None:
    mu, mask = torch.full((1, 1, 2), 3.0), torch.ones(1, 2, dtype=torch.bool)
    # v = 5 mu + 2 whatever x and t are: guided (1 + g) 17 - g 2.
    found = sample(lambda x, t, mu, _: 5 * mu + 2, mu, mask, seeded(), guidance=guidance, temperature=0.0)
    torch.testing.assert_close(found, torch.full((1, 1, 2), (1 + guidance) * 17 - guidance * 2))


def test_sampling_starts_from_scaled_noise_and_leaves_padding_zero() -> None:
    mu = torch.zeros(2, 40, 50)
    mask = length_mask(torch.tensor([50, 20]), 50)
    rest = lambda x, *_: torch.zeros_like(x)  # noqa: E731
    found = sample(rest, mu, mask, seeded(), temperature=0.5)
    assert found[0].std().item() == pytest.approx(0.5, abs=0.02)
    assert found[1, :, 20:].abs().max() == 0
    torch.testing.assert_close(found, sample(rest, mu, mask, seeded(), temperature=0.5))
    with pytest.raises(ValueError, match="steps 0"):
        sample(rest, mu, mask, seeded(), steps=0)

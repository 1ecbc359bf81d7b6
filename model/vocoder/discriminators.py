"""HiFi-GAN's discriminators (Kong et al. 2020): of the wave folded by periods, and of the wave at several rates."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from model.vocoder.config import DiscriminatorConfig
from model.vocoder.hifigan import SLOPE


class Discriminators(nn.Module):
    """All of them together: first the periods, then the scales."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.periods = nn.ModuleList(PeriodDiscriminator(p, config.period_channels) for p in config.periods)
        # The first of the scales is held by spectral norm, as in the public code.
        norms: list[Callable[..., nn.Module]] = [spectral_norm, *[weight_norm] * (config.scales - 1)]
        self.scales = nn.ModuleList(ScaleDiscriminator(config, norm) for norm in norms[: config.scales])
        self.halve = nn.AvgPool1d(4, 2, padding=2)

    def forward(self, wave: Tensor) -> tuple[list[Tensor], list[list[Tensor]]]:
        """Judge waves.

        Args:
            wave: [B, 1, N].

        Returns:
            For each discriminator, its scores [B, n] (1: real, 0: made), and what each of its layers gave, the scores'
            layer included, for `feature_loss`.
        """
        found = [one(wave) for one in self.periods]
        for number, one in enumerate(self.scales):
            wave = self.halve(wave) if number else wave
            found.append(one(wave))
        return [features[-1].flatten(1) for features in found], found


class PeriodDiscriminator(nn.Module):
    """Sees samples `period` apart: the wave as [B, 1, N / period, period], which its kernels do not cross."""

    def __init__(self, period: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.period = period
        inputs, strides = (1, *channels[:-1]), (*[3] * (len(channels) - 1), 1)
        self.convs = nn.ModuleList(
            weight_norm(nn.Conv2d(a, b, (5, 1), (stride, 1), padding=(2, 0)))
            for a, b, stride in zip(inputs, channels, strides, strict=True)
        )
        self.conv_post = weight_norm(nn.Conv2d(channels[-1], 1, (3, 1), padding=(1, 0)))

    def forward(self, wave: Tensor) -> list[Tensor]:
        """What each layer gives for a wave [B, 1, N]: [B, C, n, period]."""
        wave = F.pad(wave, (0, -wave.shape[-1] % self.period), "reflect")
        return _layers(wave.unflatten(-1, (-1, self.period)), self.convs, self.conv_post)


class ScaleDiscriminator(nn.Module):
    """Sees the wave as it is, with grouped convolutions of long kernels."""

    def __init__(self, config: DiscriminatorConfig, norm: Callable[..., nn.Module]) -> None:
        super().__init__()
        channels = config.scale_channels
        shapes = zip(
            (1, *channels[:-1]),
            channels,
            config.scale_kernels,
            config.scale_strides,
            config.scale_groups,
            strict=True,
        )
        self.convs = nn.ModuleList(
            norm(nn.Conv1d(a, b, kernel, stride, padding=kernel // 2, groups=groups))
            for a, b, kernel, stride, groups in shapes
        )
        self.conv_post = norm(nn.Conv1d(channels[-1], 1, 3, padding=1))

    def forward(self, wave: Tensor) -> list[Tensor]:
        """What each layer gives for a wave [B, 1, N]: [B, C, n]."""
        return _layers(wave, self.convs, self.conv_post)


def _layers(x: Tensor, convs: nn.ModuleList, last: nn.Module) -> list[Tensor]:
    features = []
    for conv in convs:
        x = F.leaky_relu(conv(x), SLOPE)
        features.append(x)
    return [*features, last(x)]

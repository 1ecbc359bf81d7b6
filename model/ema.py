"""Moving average of what training changes in a network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class MovingAverage:
    """Exponential moving average: after each step, average += (1 - decay) * (value - average), over the trained
    parameters and what goes with them, the running statistics of BatchNorm.

    The decay rises to its value as (1 + step) / (10 + step), so that the first parameters are soon forgotten.
    """

    def __init__(self, network: nn.Module, decay: float, state: Mapping[str, Tensor] | None = None) -> None:
        self.decay = decay
        self._live = {name: p.detach() for name, p in network.named_parameters() if p.requires_grad}
        self._live |= {name: buffer for name, buffer in network.named_buffers() if buffer.is_floating_point()}
        begin = self._live | dict(state or {})
        self.average = {name: begin[name].to(value.device).clone() for name, value in self._live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the values after `step` steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.average.values()), list(self._live.values()), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The network has the averages inside."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, value in self._live.items():
            kept = value.clone()
            value.copy_(self.average[name])
            self.average[name].copy_(kept)

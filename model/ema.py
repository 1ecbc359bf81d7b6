"""Moving average of the trained parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class MovingAverage:
    """Exponential moving average: after each step, average += (1 - decay) * (parameter - average).

    The decay rises to its value as (1 + step) / (10 + step), so that the first parameters are soon forgotten.
    """

    def __init__(self, network: nn.Module, decay: float, state: Mapping[str, Tensor] | None = None) -> None:
        self.decay = decay
        self._live = {name: p for name, p in network.named_parameters() if p.requires_grad}
        begin = self._live if state is None else state
        self.average = {name: begin[name].detach().to(p.device).clone() for name, p in self._live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters after `step` steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in self._live.values()], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The network has the averaged parameters inside."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self._live.items():
            kept = parameter.detach().clone()
            parameter.copy_(self.average[name])
            self.average[name].copy_(kept)

"""Running means between two log lines."""

from __future__ import annotations

import time


class Meter:
    """Means between two log lines, and the share of time spent waiting for data."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._start = self._ready = time.perf_counter()
        self._waited, self._steps = 0.0, 0
        self._sums: dict[str, float] = {}

    def add(self, values: dict[str, float], arrived: float) -> None:
        self._waited += arrived - self._ready
        self._ready = time.perf_counter()
        self._steps += 1
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def take(self, batch: int) -> dict[str, float]:
        elapsed = time.perf_counter() - self._start
        means = {name: value / self._steps for name, value in self._sums.items()}
        means["steps_per_s"] = self._steps / elapsed
        means["clips_per_s"] = self._steps * batch / elapsed
        means["data_wait"] = self._waited / elapsed
        self._reset()
        return means

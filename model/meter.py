"""What a training run says of itself: running means between two log lines, speed, waiting, memory and utilisation."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


class NotFinite(Exception):
    """A loss or the gradient of a step is NaN or infinite."""

    def __init__(self, step: int, keys: list[str], values: dict[str, float]) -> None:
        super().__init__(f"step {step}")
        self.step, self.keys, self.values = step, keys, values


@dataclass(frozen=True)
class _Step:
    number: int
    keys: list[str]
    names: list[str]
    values: Tensor
    arrived: torch.cuda.Event | None


class Meter:
    """Means between two log lines.

    On a GPU a step's values are looked at while the next step runs, so that the host never waits for the one at hand.

    Args:
        device: where the network runs.
        flops: floating-point operations of one step of this process.
        peak: operations per second that the device reaches at best, in the precision of training.
    """

    def __init__(self, device: torch.device, flops: float, peak: float) -> None:
        self._device, self._utilisation = device, flops / peak
        self._pending: deque[_Step] = deque()
        self._reset()

    def _reset(self) -> None:
        self._start = self._ready = time.perf_counter()
        self._waited, self._steps = 0.0, 0
        self._sums: dict[str, float] = {}
        self._counts: Counter[str] = Counter()

    def arrived(self) -> None:
        """A batch is here: the time since the last step's end was spent waiting."""
        self._waited += time.perf_counter() - self._ready

    def add(self, step: int, keys: list[str], values: Mapping[str, Tensor]) -> None:
        """Take in a step that was launched: scalars on the device, and the keys of its clips.

        Raises:
            NotFinite: this step, or on a GPU the one before, has a value that is not finite.
        """
        # float32 holds all of them, and is one copy.
        stacked = torch.stack([value.detach().float() for value in values.values()])
        event = None
        if self._device.type == "cuda":
            stacked = stacked.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending.append(_Step(step, keys, list(values), stacked, event))
        self.settle(behind=int(event is not None))
        self._ready = time.perf_counter()

    def settle(self, behind: int = 0) -> None:
        """Look at every step that was launched but the last `behind`.

        Raises:
            NotFinite: see `add`.
        """
        while len(self._pending) > behind:
            step = self._pending.popleft()
            if step.arrived is not None:
                step.arrived.synchronize()
            values = dict(zip(step.names, step.values.tolist(), strict=True))
            if not all(math.isfinite(value) for value in values.values()):
                raise NotFinite(step.number, step.keys, values)
            self._steps += 1
            for name, value in values.items():
                self._sums[name] = self._sums.get(name, 0.0) + value
                self._counts[name] += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is no part of the training's time."""
        begin = time.perf_counter()
        yield
        now = time.perf_counter()
        self._start += now - begin
        self._ready = now

    def take(self, clips: int) -> dict[str, float]:
        """Means since the last call, of each value over the steps that had it, with `steps_per_s`, `clips_per_s`,
        `data_wait` (share of the time), `memory_gb` (at its peak, on the GPU where there is one) and `mfu`.

        Args:
            clips: of a step, all processes together.

        Raises:
            NotFinite: see `add`.
        """
        self.settle()
        elapsed = time.perf_counter() - self._start
        means = {name: value / self._counts[name] for name, value in self._sums.items()}
        means["steps_per_s"] = self._steps / elapsed
        means["clips_per_s"] = self._steps * clips / elapsed
        means["data_wait"] = self._waited / elapsed
        means["memory_gb"] = _peak_memory(self._device) / 1e9
        means["mfu"] = self._utilisation * means["steps_per_s"]
        self._reset()
        return means


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def terms_of(values: Mapping[str, float]) -> str:
    """Names and values for a line of the log."""
    return " ".join(f"{name} {value:.3f}" for name, value in values.items())


def log_line(step: int, epoch: int, digest: str, means: Mapping[str, float]) -> str:
    """What a step says: `digest` of its clips, and what `Meter.take` gave."""
    pace = ("steps_per_s", "clips_per_s", "data_wait", "memory_gb", "mfu")
    terms = terms_of({name: value for name, value in means.items() if name not in pace})
    return (
        f"step {step} epoch {epoch} data {digest}: {terms} | {means['steps_per_s']:.2f} steps/s, "
        f"{means['clips_per_s']:.1f} clips/s, waiting for data {means['data_wait']:.1%}, {means['memory_gb']:.2f} GB, "
        f"MFU {means['mfu']:.1%}"
    )

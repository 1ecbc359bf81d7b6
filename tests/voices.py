"""A made-up voice for tests of metrics."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def vowel(seconds: float, pitch: float = 120.0, seed: int = 0) -> NDArray[np.float32]:
    """24 harmonics that swell three times a second, and a little noise; mono 16 kHz."""
    time = np.arange(int(seconds * 16_000)) / 16_000
    wave = sum((np.sin(2 * np.pi * pitch * k * time + k) / k for k in range(1, 25)), np.zeros(len(time)))
    noise = 0.003 * np.random.default_rng(seed).standard_normal(len(time))
    return (0.15 * wave * (0.6 + 0.4 * np.sin(2 * np.pi * 3 * time)) + noise).astype(np.float32)

"""Standardised pitch: what the model predicts in place of hertz."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

PitchMode = Literal["zero", "voiced", "interpolate"]
"""Three readings of "zero mean and unit variance over an entire sequence".

`zero`: unvoiced frames are 0 Hz and count in the statistics. `voiced`: statistics over voiced frames alone, unvoiced
frames are 0 afterwards. `interpolate`: straight lines through unvoiced stretches (held at the ends), then standardised.
"""

EPSILON = 1e-5


def standardise(f0: NDArray[np.float32], mode: PitchMode = "zero") -> NDArray[np.float32]:
    """Standardise the pitch of a whole clip (before any crop).

    Args:
        f0: float [T] in Hz, NaN where unvoiced.
        mode: see `PitchMode`.

    Returns:
        float32 [T], (x - mean) / (standard deviation + 1e-5); all zeros where no frame is voiced.
    """
    voiced = f0 == f0
    if not voiced.any():
        return np.zeros(len(f0), np.float32)
    hertz = f0.astype(np.float64)
    if mode == "zero":
        hertz[~voiced] = 0.0
        counted = hertz
    elif mode == "voiced":
        counted = hertz[voiced]
    else:
        hertz = np.interp(np.arange(len(f0)), np.flatnonzero(voiced), hertz[voiced])
        counted = hertz
    mean = np.add.reduce(counted) / len(counted)
    away = counted - mean
    deviation = math.sqrt(np.add.reduce(away * away) / len(counted))
    standard = (hertz - mean) / (deviation + EPSILON)
    if mode == "voiced":
        standard[~voiced] = 0.0
    return standard.astype(np.float32)

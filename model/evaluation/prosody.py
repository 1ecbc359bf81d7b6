"""Errors of pitch and energy, frame by frame: the two sounds are on one clock, so nothing is warped."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from model.evaluation.figures import Sums
from pipeline.stages.energy import energy
from pipeline.stages.pitch import track_pitch
from shards.mel import Filterbank, log_mel


def pitch_errors(generated: NDArray[np.float32], reference: NDArray[np.float32], fmin: float, fmax: float) -> Sums:
    """Figures of pitch by pYIN of two signals [N] of one length, mono 16 kHz, N at least 640.

    `rmse_f0` and `rmse_f0_clip` are absent where no frame is voiced in both.
    """
    ours, theirs = track_pitch(generated, fmin, fmax), track_pitch(reference, fmin, fmax)
    return compare_pitch(ours, theirs)


def compare_pitch(generated: NDArray[np.float32], reference: NDArray[np.float32]) -> Sums:
    """The same from pitch tracks [T] in Hz, NaN where unvoiced."""
    ours, theirs = generated.astype(np.float64), reference.astype(np.float64)
    voiced, expected = ~np.isnan(ours), ~np.isnan(theirs)
    frames = float(len(ours))
    both = voiced & expected
    sums: Sums = {
        "rmse_f0_zero": (float(((np.nan_to_num(ours) - np.nan_to_num(theirs)) ** 2).sum()), frames),
        "voicing_error": (float((voiced != expected).sum()), frames),
    }
    if both.any():
        squared = (ours[both] - theirs[both]) ** 2
        sums["rmse_f0"] = (float(squared.sum()), float(both.sum()))
        sums["rmse_f0_clip"] = (float(np.sqrt(squared.mean())), 1.0)
    return sums


def energy_errors(generated: NDArray[np.float32], reference: NDArray[np.float32], filterbank: Filterbank) -> Sums:
    """Figures of energy, and of the log-mels that it is read from, of two signals [N] of one length, mono 16 kHz, N at
    least 640."""
    ours, theirs = log_mel(generated, filterbank), log_mel(reference, filterbank)
    apart = np.abs(ours.astype(np.float64) - theirs)
    sums: Sums = {"mae_mel": (float(apart.sum()), float(apart.size))}
    for key, kind in (("mae_energy", "log_norm"), ("mae_energy_linear", "norm")):
        apart = np.abs(energy(ours, kind).astype(np.float64) - energy(theirs, kind))  # type: ignore[arg-type]
        sums[key] = (float(apart.sum()), float(len(apart)))
    return sums

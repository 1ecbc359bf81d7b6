"""Probabilistic YIN (Mauch and Dixon 2014), equal to `librosa.pyin` to the last bit and many times faster.

Two things make it fast. What depends on the settings alone is made once (`_plan`). And the Viterbi search does not try
every pair of states: all steps longer than pitch can move cost the same, so that the best state stands for them all; of
the others, short steps come first, and a bound mostly shows that no longer one can win; and voiced states without a
candidate are so unlikely that a bound on the best of them mostly rules them out at once.

Two things make it exact. Sums, products and comparisons come in librosa's order and number types, without fused or
reordered operations (no fastmath); a state is only ever left out where rounding, being monotone, cannot make it win.
Transcendental functions, Fourier transforms and matrix products are those of the libraries that librosa calls.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import scipy.fft
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from pipeline import pyin_loops
from pipeline.pyin_loops import TINY

Floats = NDArray[np.float64]

# librosa's defaults
_THRESHOLDS = 100
_BETA = (2, 18)
_BOLTZMANN = 2
_BINS_PER_SEMITONE = 10
_SEMITONES_PER_SECOND = 35.92 * 12
_SWITCH = 0.01
_NO_TROUGH = 0.01

_BLOCK = 64  # frames whose spectra are in memory at once: a multiple of what transforms take side by side


def pyin(
    wave: NDArray[np.floating[Any]],
    *,
    fmin: float,
    fmax: float,
    sr: float = 22050,
    frame_length: int = 2048,
    hop_length: int | None = None,
) -> tuple[Floats, NDArray[np.bool_], Floats]:
    """Fundamental frequency as `librosa.pyin(wave, ..., center=False)` gives it, other settings at their defaults.

    Needs about 2 kB a frame for each octave between `fmin` and `fmax`, where the scores of all states are kept.

    Args:
        wave: float32 or float64 [N], mono, finite, at least `frame_length` samples.
        fmin: lower end of the search in Hz.
        fmax: upper end of the search in Hz, at most `sr / 2`.
        sr: samples per second.
        frame_length: samples per frame; more than one period of `fmin`, two are advisable.
        hop_length: samples between frames; a quarter of a frame by default.

    Returns:
        f0 float64 [T] in Hz, NaN where unvoiced; voiced bool [T]; probability of voicing float64 [T], in [0, 1].
        T = 1 + (N - frame_length) // hop_length.

    Raises:
        ValueError: the sound or the settings are none that pYIN can work with.
    """
    hop_length = frame_length // 4 if hop_length is None else hop_length
    plan = _plan(float(fmin), float(fmax), float(sr), int(frame_length), int(hop_length))
    if wave.ndim != 1 or wave.dtype not in (np.float32, np.float64) or not np.isfinite(wave).all():
        raise ValueError(f"pyin: expected finite mono float32 or float64 sound, got {wave.dtype} {list(wave.shape)}")
    if len(wave) < frame_length:
        raise ValueError(f"pyin: {len(wave)} samples are less than one frame of {frame_length}")
    frames = sliding_window_view(wave, frame_length)[::hop_length]
    counts, lags, shifts, weights = (
        np.concatenate(part)
        for part in zip(
            *(_candidates(frames[k : k + _BLOCK], plan) for k in range(0, len(frames), _BLOCK)), strict=True
        )
    )
    hertz = plan.sr / (plan.min_period + lags + shifts)
    bins = 12 * _BINS_PER_SEMITONE * np.log2(hertz / plan.fmin)
    bins = np.clip(np.round(bins), 0, plan.n_bins).astype(np.int64)
    counts, bins, weights, voiced_prob = pyin_loops.collect(counts, bins, weights, plan.n_bins)
    if len(frames) == 1:  # numpy adds up a single column pairwise
        column = np.zeros((plan.n_bins, 1))
        column[bins, 0] = weights
        voiced_prob = np.sum(column, axis=0)
    voiced_prob = np.clip(voiced_prob, 0, 1)
    unvoiced = (1 - voiced_prob) / plan.n_bins
    states = pyin_loops.viterbi(
        np.cumsum(counts) - counts,
        counts,
        bins,
        np.log(weights + TINY),
        np.log(unvoiced + TINY),
        plan.log_first,
        plan.log_zero,
        plan.pull_stay,
        plan.pull_switch,
        plan.push_stay,
        plan.push_switch,
    )
    voiced = states < plan.n_bins
    return np.where(voiced, plan.hertz[states % plan.n_bins], np.nan), voiced, voiced_prob


@dataclass(frozen=True)
class _Plan:
    """What depends on the settings alone.

    `push_*[i, d]` is the logarithm of the probability of a step from pitch bin i to i + d - w, `pull_*[d, j]` of one
    from j + d - w to j, with voicing kept (`stay`) or changed (`switch`); the band of steps is 2w + 1 wide.
    """

    sr: float
    fmin: float
    n_bins: int
    min_period: int
    max_period: int
    n_fft: int
    thresholds: Floats
    beta: Floats
    beta_sums: Floats
    boltzmann: Floats
    hertz: Floats
    log_first: float
    log_zero: float
    pull_stay: Floats
    pull_switch: Floats
    push_stay: Floats
    push_switch: Floats


@lru_cache(maxsize=8)
def _plan(fmin: float, fmax: float, sr: float, frame_length: int, hop_length: int) -> _Plan:
    import scipy.signal
    import scipy.stats

    if hop_length < 1 or frame_length < 4 or not 0 < fmin < fmax <= sr / 2:
        raise ValueError(f"pyin: needs hop_length >= 1 and 0 < fmin < fmax <= sr / 2, got {fmin=}, {fmax=}, {sr=}")
    if sr / fmin >= frame_length - 1:
        raise ValueError(f"pyin: a period of fmin {fmin:g} Hz at {sr:g} Hz does not fit into {frame_length} samples")
    min_period = int(np.floor(sr / fmax))
    max_period = min(int(np.ceil(sr / fmin)), frame_length - 1)
    n_bins = int(np.floor(12 * _BINS_PER_SEMITONE * np.log2(fmax / fmin))) + 1
    reach = round(_SEMITONES_PER_SECOND * hop_length / sr) * _BINS_PER_SEMITONE // 2
    if n_bins < max(2 * reach + 1, 2):
        raise ValueError(
            f"pyin: {fmin:g} to {fmax:g} Hz are {n_bins} bins, less than the {2 * reach + 1} that pitch may move in a "
            "step; take a wider range or shorter steps"
        )
    thresholds = np.linspace(0, 1, _THRESHOLDS + 1)
    beta = np.diff(scipy.stats.beta.cdf(thresholds, *_BETA))
    most = (max_period - min_period) // 2 + 1
    ranks, totals = np.arange(most), np.arange(1, most + 1)[:, None]
    boltzmann = np.zeros((most + 1, most))
    boltzmann[1:] = scipy.stats.boltzmann.pmf(ranks, _BOLTZMANN, totals)

    # Rows are normalised in place, at their full length: the order of numpy's sum depends on where a value stands.
    distance = np.abs(np.subtract.outer(np.arange(n_bins), np.arange(n_bins)))
    triangle = scipy.signal.windows.triang(2 * reach + 1)[reach:]
    step = np.where(distance <= reach, triangle[np.minimum(distance, reach)], 0.0)
    step /= step.sum(axis=1, keepdims=True)
    bands = []
    for share in (1 - _SWITCH, 1.0 - (1 - _SWITCH)):
        log = np.log(share * step + TINY)
        rows = np.arange(n_bins)[:, None]
        columns = rows + np.arange(-reach, reach + 1)
        inside = (columns >= 0) & (columns < n_bins)
        columns = columns.clip(0, n_bins - 1)
        bands.append(
            (np.where(inside, log[columns, rows], -np.inf).T.copy(), np.where(inside, log[rows, columns], -np.inf))
        )
    (pull_stay, push_stay), (pull_switch, push_switch) = bands
    return _Plan(
        sr=sr,
        fmin=fmin,
        n_bins=n_bins,
        min_period=min_period,
        max_period=max_period,
        n_fft=scipy.fft.next_fast_len(2 * frame_length - 1, real=True),
        thresholds=thresholds[1:].copy(),
        beta=beta,
        beta_sums=np.array([np.sum(beta[:count]) for count in range(_THRESHOLDS + 1)]),
        boltzmann=boltzmann,
        hertz=fmin * 2 ** (np.arange(n_bins) / (12 * _BINS_PER_SEMITONE)),
        log_first=float(np.log(np.ones(2 * n_bins) / (2 * n_bins) + TINY)[0]),
        log_zero=float(np.log(np.zeros(1) + TINY)[0]),
        pull_stay=pull_stay,
        pull_switch=pull_switch,
        push_stay=push_stay,
        push_switch=push_switch,
    )


def _candidates(frames: NDArray[Any], plan: _Plan) -> tuple[NDArray[np.int64], NDArray[np.int64], Floats, Floats]:
    """Periods of each frame [T, L]: how many [T], and per period lag - min_period, its refinement and probability."""
    spectrum = scipy.fft.rfft(frames, n=plan.n_fft)
    correlation = scipy.fft.irfft(pyin_loops.power(spectrum), n=plan.n_fft)
    yin = np.empty((len(frames), plan.max_period - plan.min_period + 1))
    # A copy, even of one frame: for numba a view is another type, to be compiled again.
    pyin_loops.normalised_difference(frames.copy(), correlation, plan.min_period, yin)
    counts, lags, shifts, firsts = pyin_loops.troughs(yin, plan.thresholds)
    prior = np.zeros((len(lags), _THRESHOLDS))
    pyin_loops.fill_prior(counts, firsts, plan.boltzmann, prior)
    weights = np.empty(len(lags))
    ends = np.cumsum(counts)
    for begin, end in zip((ends - counts).tolist(), ends.tolist(), strict=True):
        if end > begin:  # one product per frame: how BLAS rounds depends on the shape
            np.dot(prior[begin:end], plan.beta, out=weights[begin:end])
    pyin_loops.add_lowest(yin, counts, lags, firsts, _NO_TROUGH * plan.beta_sums, weights)
    kept = weights != 0
    owner = np.repeat(np.arange(len(frames)), counts)[kept]
    return np.bincount(owner, minlength=len(frames)), lags[kept], shifts[kept], weights[kept]

"""Loops of pYIN that numba compiles: exact, so without fastmath; every sum runs in librosa's order and number type.

Arguments are arrays, with T frames; `counts` [T] says how many consecutive entries of the flat arrays belong to each.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

TINY = float(np.finfo(np.float64).tiny)
_TILE = 64  # neighbouring states that share one decision about how long steps can be
_compiled = numba.njit(cache=True, error_model="numpy")


@_compiled
def power(spectrum: Any) -> Any:
    power = np.empty(spectrum.shape, spectrum.real.dtype)
    for i in range(spectrum.shape[0]):
        for k in range(spectrum.shape[1]):
            power[i, k] = spectrum[i, k].real ** 2 + spectrum[i, k].imag ** 2
    return power


@_compiled
def normalised_difference(frames: Any, correlation: Any, min_period: int, yin: Any) -> None:
    """Cumulative mean normalised difference (de Cheveigné and Kawahara 2002, eq. 8) at lags from `min_period` >= 2."""
    for i in range(yin.shape[0]):
        energy = frames[i, 0] * frames[i, 0]
        difference = correlation[i, 0] - correlation[i, 1]
        difference += difference
        total = difference
        for lag in range(2, min_period + yin.shape[1]):
            energy += frames[i, lag - 1] * frames[i, lag - 1]
            difference = correlation[i, 0] - correlation[i, lag]
            difference = (difference + difference) - energy
            total += difference
            if lag >= min_period:
                yin[i, lag - min_period] = np.float64(difference) / (np.float64(total) / lag + TINY)


@_compiled
def troughs(yin: Any, thresholds: Any) -> Any:
    """Local minima: number per frame; lag, parabolic shift and index of the lowest threshold above it, of each."""
    n_frames, n_lags = yin.shape
    counts = np.zeros(n_frames, np.int64)
    lags = np.empty(n_frames * ((n_lags + 1) // 2), np.int64)
    shifts = np.zeros(len(lags))
    firsts = np.empty(len(lags), np.int64)
    n = 0
    for i in range(n_frames):
        begin = n
        for k in range(n_lags):
            here = yin[i, k]
            if k == 0:
                low = here < yin[i, 1]
            else:
                low = here < yin[i, k - 1] and (k == n_lags - 1 or here <= yin[i, k + 1])
            if not low:
                continue
            lags[n] = k
            firsts[n] = np.searchsorted(thresholds, here, side="right")
            if 0 < k < n_lags - 1:
                curve = yin[i, k + 1] + yin[i, k - 1] - 2 * here
                slope = (yin[i, k + 1] - yin[i, k - 1]) / 2
                if not np.abs(slope) >= np.abs(curve):
                    shifts[n] = -slope / curve
            n += 1
        counts[i] = n - begin
    return counts, lags[:n].copy(), shifts[:n].copy(), firsts[:n].copy()


@_compiled
def fill_prior(counts: Any, firsts: Any, boltzmann: Any, prior: Any) -> None:
    """Weight of each trough under each threshold: Boltzmann's in the order of periods among those below it."""
    begin = 0
    total = np.empty(prior.shape[1], np.int64)
    seen = np.empty(prior.shape[1], np.int64)
    for count in counts:
        total[:] = 0
        seen[:] = 0
        for m in range(begin, begin + count):
            for c in range(firsts[m], len(total)):
                total[c] += 1
        for m in range(begin, begin + count):
            for c in range(firsts[m], len(total)):
                prior[m, c] = boltzmann[total[c], seen[c]]
                seen[c] += 1
        begin += count


@_compiled
def add_lowest(yin: Any, counts: Any, lags: Any, firsts: Any, bonus: Any, weights: Any) -> None:
    """The lowest trough of a frame also gets the thresholds that none is below."""
    begin = 0
    for i in range(len(counts)):
        if counts[i] > 0:
            lowest = begin
            for m in range(begin, begin + counts[i]):
                if yin[i, lags[m]] < yin[i, lags[lowest]]:
                    lowest = m
            weights[lowest] += bonus[firsts[lowest]]
        begin += counts[i]


@_compiled
def collect(counts: Any, bins: Any, weights: Any, n_bins: int) -> Any:
    """Candidates sorted by pitch bin, the longest period's where several share one; and the sum of each frame."""
    sums = np.zeros(len(counts))
    kept = np.zeros(len(counts), np.int64)
    row = np.zeros(n_bins + 1)
    begin = 0
    n = 0
    for t in range(len(counts)):
        lowest, highest = n_bins, 0
        for m in range(begin, begin + counts[t]):
            row[bins[m]] = weights[m]
            lowest = min(lowest, bins[m])
            highest = max(highest, bins[m])
        begin += counts[t]
        first = n
        for b in range(lowest, min(highest + 1, n_bins)):
            if row[b] != 0:
                sums[t] += row[b]
                bins[n] = b
                weights[n] = row[b]
                row[b] = 0
                n += 1
        row[n_bins] = 0
        kept[t] = n - first
    return kept, bins[:n].copy(), weights[:n].copy(), sums


@_compiled
def _highest(values: Any) -> float:
    a = b = c = d = -np.inf
    whole = len(values) // 4 * 4
    for k in range(0, whole, 4):
        a = max(a, values[k])
        b = max(b, values[k + 1])
        c = max(c, values[k + 2])
        d = max(d, values[k + 3])
    for k in range(whole, len(values)):
        a = max(a, values[k])
    return max(max(a, b), max(c, d))


@_compiled
def _lowest(values: Any) -> float:
    a = b = c = d = np.inf
    whole = len(values) // 4 * 4
    for k in range(0, whole, 4):
        a = min(a, values[k])
        b = min(b, values[k + 1])
        c = min(c, values[k + 2])
        d = min(d, values[k + 3])
    for k in range(whole, len(values)):
        a = min(a, values[k])
    return min(min(a, b), min(c, d))


@_compiled
def _push(score: float, band: Any, best: Any) -> None:
    """best = max(best, score + band), elementwise."""
    for j in range(len(best)):
        new = score + band[j]
        best[j] = new if new > best[j] else best[j]


@_compiled
def _pull_steps(source: Any, band: Any, at: int, begin: int, end: int, best: Any) -> None:
    """best[j] = max of itself and source[at + j + d] + band[d, at + j] for d from `begin` to `end`, five at a time."""
    for d in range(begin, end, 5):
        s0, s1, s2 = source[at + d :], source[at + d + 1 :], source[at + d + 2 :]
        s3, s4 = source[at + d + 3 :], source[at + d + 4 :]
        b0, b1, b2 = band[d, at:], band[d + 1, at:], band[d + 2, at:]
        b3, b4 = band[d + 3, at:], band[d + 4, at:]
        for j in range(len(best)):
            u, v, w = s0[j] + b0[j], s1[j] + b1[j], s2[j] + b2[j]
            x, y = s3[j] + b3[j], s4[j] + b4[j]
            u = u if u > v else v
            w = w if w > x else x
            y = y if y > best[j] else best[j]
            u = u if u > w else w
            best[j] = u if u > y else y


@_compiled
def _pull(source: Any, band: Any, beyond: Any, best: Any) -> None:
    """best[j] = max of itself and source[j + d] + band[d, j] over d.

    For some neighbouring j at a time, from short steps to long ones, until no longer step can win: `beyond[k]` is the
    largest logarithm of a probability of steps over k or more bins.
    """
    reach = len(band) // 2
    for at in range(0, len(best), _TILE):
        tile = best[at : at + _TILE]
        for j in range(len(tile)):
            score = source[at + j + reach] + band[reach, at + j]
            tile[j] = score if score > tile[j] else tile[j]
        near = min(reach, 5)
        _pull_steps(source, band, at, reach - near, reach, tile)
        _pull_steps(source, band, at, reach + 1, reach + 1 + near, tile)
        top = _highest(source[at : at + len(tile) + 2 * reach])
        low = _lowest(tile)
        far = near
        while far < reach and top + beyond[far + 1] > low:
            far += 5
        _pull_steps(source, band, at, reach - far, reach - near, tile)
        _pull_steps(source, band, at, reach + 1 + near, reach + 1 + far, tile)


@_compiled
def viterbi(
    begins: Any,
    counts: Any,
    bins: Any,
    log_voiced: Any,
    log_unvoiced: Any,
    log_first: float,
    log_zero: float,
    pull_stay: Any,
    pull_switch: Any,
    push_stay: Any,
    push_switch: Any,
) -> Any:
    """Most likely states [T], voiced pitch bins first, then unvoiced ones.

    `log_zero` stands for probability 0, of steps out of the band as of voiced states without a candidate.
    """
    n_frames = len(counts)
    n, width = push_stay.shape
    reach = width // 2
    # Scores of voiced and unvoiced bins, with margins that never win.
    value = np.full((n_frames, 2, n + 2 * reach), -np.inf)
    value[0, 0, reach : reach + n] = log_zero + log_first
    for m in range(begins[0], begins[0] + counts[0]):
        value[0, 0, reach + bins[m]] = log_voiced[m] + log_first
    value[0, 1, reach : reach + n] = log_unvoiced[0] + log_first
    beyond_stay, beyond_switch = np.empty(reach + 1), np.empty(reach + 1)
    for k in range(reach, -1, -1):
        for band, beyond in ((push_stay, beyond_stay), (push_switch, beyond_switch)):
            beyond[k] = max(_highest(band[:, reach - k].copy()), _highest(band[:, reach + k].copy()))
            if k < reach:
                beyond[k] = max(beyond[k], beyond[k + 1])
    likeliest = max(beyond_stay[0], beyond_switch[0])
    empty_bound = log_zero + log_first
    for t in range(1, n_frames):
        voiced, unvoiced = value[t - 1, 0], value[t - 1, 1]
        to_voiced, to_unvoiced = value[t, 0, reach : reach + n], value[t, 1, reach : reach + n]
        floor = max(_highest(voiced), _highest(unvoiced)) + log_zero
        to_voiced[:] = floor
        to_unvoiced[:] = floor
        # Voiced states with a candidate come one by one, the others only where one of them could win somewhere.
        for m in range(begins[t - 1], begins[t - 1] + counts[t - 1]):
            i = bins[m]
            score = voiced[reach + i]
            low, high = max(i - reach, 0), min(i + reach + 1, n)
            _push(score, push_stay[i, low - i + reach : high - i + reach], to_voiced[low:high])
            _push(score, push_switch[i, low - i + reach : high - i + reach], to_unvoiced[low:high])
        _pull(unvoiced, pull_stay, beyond_stay, to_unvoiced)
        _pull(unvoiced, pull_switch, beyond_switch, to_voiced)
        bound = empty_bound + likeliest
        if bound > floor and bound > min(_lowest(to_voiced), _lowest(to_unvoiced)):
            _pull(voiced, pull_stay, beyond_stay, to_voiced)
            _pull(voiced, pull_switch, beyond_switch, to_unvoiced)
        empty_bound = _highest(to_voiced) + log_zero
        to_unvoiced += log_unvoiced[t]
        begin, end = begins[t], begins[t] + counts[t]
        kept = to_voiced[bins[begin:end]]
        to_voiced += log_zero
        for m in range(begin, end):
            to_voiced[bins[m]] = kept[m - begin] + log_voiced[m]

    states = np.empty(n_frames, np.int64)
    last = value[-1, :, reach : reach + n]
    states[-1] = np.argmax(last[0]) if last[0].max() >= last[1].max() else n + np.argmax(last[1])
    for t in range(n_frames - 2, -1, -1):
        to_voicing, j = divmod(states[t + 1], n)
        top = -np.inf
        for voicing in range(2):
            band = push_stay if voicing == to_voicing else push_switch
            for i in range(n):
                d = j - i + reach
                score = value[t, voicing, reach + i] + (band[i, d] if 0 <= d < width else log_zero)
                if score > top:
                    top = score
                    states[t] = voicing * n + i
    return states

"""Speech from a log-mel spectrogram without a trained vocoder.

Filterbank inversion, then fast Griffin-Lim (Perraudin, Balazs and Sondergaard 2013) in the framing of `shards.mel`:
T frames give exactly 320 T samples, and frame k is centred on sample 320k + 160.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.mel import N_FFT, PAD, Filterbank, mel_filters, stft, window
from shards.schema import HOP, MEL_BINS

MOMENTUM = 0.99
INVERSION_STEPS = 100

Floats = NDArray[np.float64]


def griffin_lim(
    mel: NDArray[np.float32], filterbank: Filterbank = "htk", iterations: int = 60, seed: int = 0
) -> NDArray[np.float32]:
    """A waveform whose log-mel is near `mel`.

    Args:
        mel: float [T, 80], ln amplitude, T at least 2.
        filterbank: the one that `mel` was made with.
        iterations: rounds of phase retrieval.
        seed: of the phases it starts from; a seed gives one waveform.

    Returns:
        float32 [320 T] at the level that the mel states; it may pass beyond 1 where the mel does.

    Raises:
        ValueError: another shape, or values that are not finite.
    """
    if mel.ndim != 2 or mel.shape[1] != MEL_BINS or len(mel) < 2 or not np.isfinite(mel).all():
        raise ValueError(f"expected a finite log-mel [T >= 2, {MEL_BINS}], got shape {mel.shape}")
    magnitude = invert_filterbank(np.exp(mel.astype(np.float64)), mel_filters(filterbank))
    turns = np.random.default_rng(seed).random(magnitude.shape)
    spectra = magnitude * np.exp(2j * np.pi * turns)
    previous = np.zeros_like(spectra)
    for _ in range(iterations):
        consistent = stft(inverse_stft(spectra))
        ahead = consistent + MOMENTUM * (consistent - previous)
        spectra = magnitude * ahead / np.maximum(np.abs(ahead), 1e-12)
        previous = consistent
    return inverse_stft(spectra).astype(np.float32)


def playable(mel: NDArray[np.float32], filterbank: Filterbank = "htk", seed: int = 0) -> NDArray[np.float32]:
    """What `griffin_lim` gives, made quieter as a whole where it would pass beyond 1: float32 [320 T]."""
    wave = griffin_lim(mel, filterbank, seed=seed)
    return wave / max(1.0, float(np.abs(wave).max(initial=0)))


def invert_filterbank(mel: Floats, filters: Floats, steps: int = INVERSION_STEPS) -> Floats:
    """Non-negative amplitudes S with S @ filters.T near `mel`, by multiplicative updates (Lee and Seung 2001).

    Each update weighs errors by the inverse of the estimate (the Kullback-Leibler divergence), so that quiet bins count
    as they do in a log-mel.

    Args:
        mel: [T, bins] amplitudes; filters: [bins, K].

    Returns:
        [T, K].
    """
    reach = np.maximum(filters.sum(axis=0), 1e-12)
    amplitude = mel @ (filters / filters.sum(axis=1, keepdims=True) ** 2) + 1e-12
    for _ in range(steps):
        amplitude *= (mel / np.maximum(amplitude @ filters.T, 1e-12)) @ filters / reach
    return amplitude


def inverse_stft(spectra: NDArray[Any]) -> Floats:
    """The signal [320 T] whose `shards.mel.stft` is nearest to `spectra` [T, 641] in the least-squares sense.

    (Up to the reflected ends, which the forward transform makes from the signal itself.)
    """
    frames = np.fft.irfft(spectra, N_FFT, axis=1) * window()
    total = len(frames) * HOP + 2 * PAD
    shape = (len(frames), N_FFT)
    weight = overlap_add(np.broadcast_to(window() ** 2, shape), total)
    inner = slice(PAD, total - PAD)
    return overlap_add(frames, total)[inner] / weight[inner]


def overlap_add(frames: Floats, total: int) -> Floats:
    """Sum frames [T, 1280] at steps of 320 into [total]; four hops make a frame, so four shifted sums do it."""
    signal = np.zeros(total)
    for part in range(N_FFT // HOP):
        piece = frames[:, part * HOP : (part + 1) * HOP].reshape(-1)
        signal[part * HOP : part * HOP + len(piece)] += piece
    return signal

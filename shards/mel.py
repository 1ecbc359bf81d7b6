"""The log-mel spectrogram, in numpy alone: pipeline, training and synthesis all compute it here.

16 kHz, window and FFT 1280 (periodic Hann), hop 320, 80 bins over 0-8000 Hz, amplitude (power 1), natural logarithm.
Reflect padding by 480 on both sides centres frame k on sample 320k + 160, and N = 640F samples give exactly 2F frames
(the framing of HiFi-GAN, Kong et al. 2020, and Matcha-TTS, Mehta et al. 2024).
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from shards.schema import HOP, MEL_BINS, SAMPLE_RATE

Filterbank = Literal["htk", "slaney"]
"""`htk`: HTK mel scale, unit peaks (torchaudio's default). `slaney`: Slaney scale, unit area (librosa's default)."""

N_FFT = 1280
PAD = (N_FFT - HOP) // 2
FLOOR = 1e-5
"""Amplitudes below this are set to it before the logarithm, so that silence is ln 1e-5 = -11.513."""

Floats = NDArray[np.float64]


def from_pcm(wav: NDArray[np.int16]) -> NDArray[np.float32]:
    """16-bit samples as floats in [-1, 1): divided by 32768, which is exact."""
    return wav.astype(np.float32) / np.float32(32768)


def hann(length: int) -> Floats:
    """Periodic Hann window, float64 [length]."""
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / length)


def mel_filters(kind: Filterbank = "htk", n_fft: int = N_FFT, bins: int = MEL_BINS, rate: int = SAMPLE_RATE) -> Floats:
    """Triangular filters over 0 Hz to half the sampling rate, float64 [bins, n_fft // 2 + 1].

    The corners are equally spaced in mel. `htk`: mel = 2595 log10(1 + f / 700), peaks of one. `slaney` (Auditory
    Toolbox): linear below 1 kHz with 200/3 Hz per mel, above it 27 mel per factor of 6.4; each triangle has unit area.
    """
    top = rate / 2
    if kind == "htk":
        corners = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + top / 700), bins + 2) / 2595) - 1)
    else:
        knee, slope, growth = 15.0, 200 / 3, np.log(6.4) / 27
        mels = np.linspace(0, knee + np.log(top / 1000) / growth, bins + 2)
        corners = np.where(mels < knee, slope * mels, 1000 * np.exp(growth * (mels - knee)))
    hertz = np.arange(n_fft // 2 + 1) * rate / n_fft
    low, mid, high = (corners[start : start + bins, None] for start in range(3))
    filters = np.maximum(0, np.minimum((hertz - low) / (mid - low), (high - hertz) / (high - mid)))
    return filters if kind == "htk" else filters * (2 / (high - low))


@cache
def _filters(kind: Filterbank) -> Floats:
    return mel_filters(kind)


@cache
def window() -> Floats:
    """The analysis window, periodic Hann, float64 [1280]."""
    return hann(N_FFT)


def stft(wave: NDArray[Any]) -> NDArray[np.complex128]:
    """Spectra of a mono signal [N] in the framing above: complex128 [N // 320, 641].

    Raises:
        ValueError: the signal is not one-dimensional or too short to be reflected (480 samples or fewer).
    """
    if wave.ndim != 1 or len(wave) <= PAD:
        raise ValueError(f"mel needs a mono signal of more than {PAD} samples, got shape {wave.shape}")
    padded = np.pad(wave.astype(np.float64), PAD, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, N_FFT)[::HOP]
    return np.fft.rfft(frames * window(), axis=1)


def log_mel(wave: NDArray[Any], filterbank: Filterbank = "htk") -> NDArray[np.float32]:
    """Log-mel spectrogram of a mono 16 kHz signal.

    Args:
        wave: float [N] in [-1, 1], raw level.
        filterbank: decoder and vocoder must share it.

    Returns:
        float32 [N // 320, 80], ln amplitude; the sums run in float64, so that machines differ in the last bit at most.

    Raises:
        ValueError: see `stft`.
    """
    mel = np.abs(stft(wave)) @ _filters(filterbank).T
    return np.log(np.maximum(mel, FLOOR)).astype(np.float32)

"""Copy synthesis: how near Griffin-Lim comes to the log-mel it is given, and whether it stays in time."""

from __future__ import annotations

import numpy as np
import pytest

from model.griffinlim import griffin_lim, inverse_stft, invert_filterbank
from shards.mel import Filterbank, log_mel, mel_filters, stft


def voice(frames: int) -> np.ndarray:
    """Harmonics of a gliding tone in syllables, over a little noise: [640 * frames], float64."""
    n = np.arange(640 * frames)
    phase = 2 * np.pi * np.cumsum(120 + 40 * np.sin(2 * np.pi * 0.9 * n / 16000)) / 16000
    sound = sum(np.cos(h * phase + h * h) / h for h in range(1, 30))
    syllables = np.clip(np.sin(2 * np.pi * 2.3 * n / 16000), 0, 1) ** 2
    return 0.1 * sound * syllables + np.random.default_rng(5).normal(0, 1e-3, len(n))


@pytest.mark.parametrize("filterbank", ["htk", "slaney"])
def test_copy_synthesis_is_near_in_log_mel_and_in_time(filterbank: Filterbank) -> None:
    original = voice(75)
    mel = log_mel(original, filterbank)
    copy = griffin_lim(mel, filterbank)
    assert copy.dtype == np.float32
    assert copy.shape == (75 * 640,)
    # 0.1 is under one decibel; a real sentence of GRID measures 0.07.
    assert np.abs(log_mel(copy, filterbank) - mel).mean() < 0.1

    def envelope(x: np.ndarray) -> np.ndarray:
        # Smoothed over a pitch period (10 ms), whose inner shape hangs on phases that are not kept.
        return np.sqrt(np.convolve((x.reshape(-1, 40).astype(np.float64) ** 2).mean(1), np.full(4, 0.25), "same"))

    a, b = envelope(original), envelope(copy)
    lags = np.arange(-20, 21)
    match = [np.corrcoef(np.roll(b, lag)[40:-40], a[40:-40])[0, 1] for lag in lags]
    assert abs(lags[int(np.argmax(match))]) <= 1  # within 2.5 ms
    assert max(match) > 0.95


@pytest.mark.parametrize("frames", [2, 3, 50])
def test_length_is_exact_and_the_seed_decides(frames: int) -> None:
    mel = np.random.default_rng(1).normal(-3, 2, (frames, 80)).astype(np.float32)
    one, again, other = (griffin_lim(mel, iterations=3, seed=s) for s in (0, 0, 1))
    assert one.shape == (320 * frames,)
    assert np.isfinite(one).all()
    assert np.array_equal(one, again)
    assert not np.allclose(one, other)


def test_silence_stays_silent() -> None:
    assert np.abs(griffin_lim(np.full((20, 80), np.log(1e-5), np.float32))).max() < 1e-4


def test_inverse_undoes_the_transform_of_any_signal() -> None:
    signal = np.random.default_rng(2).normal(0, 0.1, 640 * 7)
    np.testing.assert_allclose(inverse_stft(stft(signal)), signal, atol=1e-12)


def test_filterbank_inversion_reproduces_the_mel_of_a_real_spectrum() -> None:
    filters = mel_filters("slaney")
    mel = np.abs(stft(voice(20))) @ filters.T
    found = invert_filterbank(mel, filters)
    assert (found >= 0).all()
    np.testing.assert_allclose(np.log(found @ filters.T), np.log(mel), atol=0.02)


@pytest.mark.parametrize("shape", [(80,), (10, 79), (1, 80)])
def test_wrong_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="log-mel"):
        griffin_lim(np.zeros(shape, np.float32))


def test_values_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        griffin_lim(np.full((4, 80), np.nan, np.float32))

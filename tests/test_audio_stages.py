"""Sound: length rules, the mel grid, pitch, energy, and their standardisation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import librosa
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline import media
from pipeline.stage import Clip, Item, Reason, Reject, Rejection
from pipeline.stages.audio import Audio, AudioConfig, fit_length, level_dbfs, to_pcm
from pipeline.stages.energy import Energy, EnergyConfig, energy
from pipeline.stages.mel import Mel, MelConfig
from pipeline.stages.pitch import Pitch, PitchConfig
from shards.mel import Filterbank, log_mel, mel_filters, stft
from shards.pitch import standardise
from shards.schema import FIELDS, check_value

CLIP = Clip("clip", "some/clip.mp4", "")


def noise(samples: int, level: float = 0.1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, level, samples).astype(np.float32)


def wav_item(wave: np.ndarray) -> Item:
    return Item(CLIP, {"wav": to_pcm(wave.astype(np.float32))})


# Length rules


@given(st.integers(1, 60), st.integers(-5 * 640, 5 * 640))
def test_sound_is_cut_or_padded_to_the_sample_or_rejected(frames: int, surplus: int) -> None:
    length = max(0, frames * 640 + surplus)
    sound = np.arange(1, length + 1, dtype=np.float32)
    if -2 * 640 <= length - frames * 640 <= 3 * 640:
        fitted = fit_length(sound, frames, AudioConfig(), CLIP)
        assert len(fitted) == frames * 640
        kept = min(length, frames * 640)
        assert np.array_equal(fitted[:kept], sound[:kept])
        assert not fitted[kept:].any()
    else:
        with pytest.raises(Reject, match=r"some/clip\.mp4") as caught:
            fit_length(sound, frames, AudioConfig(), CLIP)
        assert caught.value.reason is Reason.AUDIO_LENGTH


@pytest.mark.parametrize(
    ("samples", "config", "rule"),
    [
        (10 * 640 - 1281, AudioConfig(), "max_pad_frames"),
        (10 * 640 + 1921, AudioConfig(), "max_difference_frames"),
        (10 * 640 - 1921, AudioConfig(), "max_difference_frames"),
        (10 * 640 - 1, AudioConfig(max_pad_frames=0), "max_pad_frames"),
        (10 * 640 - 1921, AudioConfig(max_pad_frames=4, max_difference_frames=4), None),
    ],
)
def test_the_broken_length_rule_is_named(samples: int, config: AudioConfig, rule: str | None) -> None:
    if rule is None:
        assert len(fit_length(noise(samples), 10, config, CLIP)) == 6400
    else:
        with pytest.raises(Reject, match=rule):
            fit_length(noise(samples), 10, config, CLIP)


def run_audio(monkeypatch: pytest.MonkeyPatch, sound: np.ndarray, frames: int) -> Any:
    monkeypatch.setattr(media, "count_frames", lambda *_: frames)
    monkeypatch.setattr(media, "decode_audio", lambda *_: sound)
    return Audio(AudioConfig()).attempt(Item(CLIP))


def test_audio_keeps_the_level_and_clips_only_what_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = noise(6400, 0.01)
    sound[:5] = [1.5, -1.5, 0.5 / 32768, 1.5 / 32768, -0.25]
    wav = run_audio(monkeypatch, sound, 10)["wav"]
    check_value(FIELDS["wav"], wav, 10)
    assert wav[:5].tolist() == [32767, -32768, 0, 2, -8192]
    np.testing.assert_allclose(wav[5:] / 32768, sound[5:], atol=0.5 / 32768)


@given(st.integers(-32768, 32767))
def test_pcm_of_a_16_bit_source_is_exact(value: int) -> None:
    assert to_pcm(np.array([value / 32768], np.float32))[0] == value


@pytest.mark.parametrize(
    ("sound", "frames", "reason"),
    [
        (np.zeros(6400, np.float32), 10, Reason.SILENT),
        (np.full(6400, 0.2, np.float32), 10, Reason.SILENT),
        (noise(6400, 0.0005), 10, Reason.SILENT),
        (np.full(6400, np.nan, np.float32), 10, Reason.UNREADABLE),
        (noise(6400), 0, Reason.TOO_SHORT),
        (np.zeros(0, np.float32), 10, Reason.AUDIO_LENGTH),
    ],
)
def test_unusable_sound_is_rejected(
    monkeypatch: pytest.MonkeyPatch, sound: np.ndarray, frames: int, reason: Reason
) -> None:
    rejection = run_audio(monkeypatch, sound, frames)
    assert isinstance(rejection, Rejection)
    assert rejection.reason is reason
    assert "some/clip.mp4" in rejection.message


def test_level_is_that_of_the_definition() -> None:
    tone = np.sin(np.arange(16000) * 2 * np.pi * 100 / 16000).astype(np.float32)
    assert level_dbfs(tone) == pytest.approx(-3.0103, abs=1e-3)
    assert level_dbfs(0.001 * tone) == pytest.approx(-63.0103, abs=1e-3)
    assert level_dbfs(np.zeros(5, np.float32)) == -np.inf


def test_real_clip_has_640_samples_per_video_frame(clips: Path) -> None:
    clip = Clip("a", str(clips / "01_grid_bbaf2n_25fps.mpg"), "")
    wav = Audio(AudioConfig()).run(Item(clip))["wav"]
    frames = media.count_frames(clip.uri, None, None)
    check_value(FIELDS["wav"], wav, frames)
    made = {"mel": Mel(MelConfig()).run(Item(clip, {"wav": wav}))["mel"]}
    made["energy"] = Energy(EnergyConfig()).run(Item(clip, made))["energy"]
    made["pitch"] = Pitch(PitchConfig()).run(Item(clip, {"wav": wav}))["pitch"]
    for name, value in made.items():
        check_value(FIELDS[name], value, frames)
    # An adult speaker of GRID: part of the sentence is voiced, in the range of speech.
    assert 0.15 < np.isfinite(made["pitch"]).mean() < 0.95
    assert 70 < np.nanmedian(made["pitch"]) < 300


# Mel


def test_filterbanks_equal_librosas() -> None:
    htk = librosa.filters.mel(sr=16000, n_fft=1280, n_mels=80, htk=True, norm=None, dtype=np.float64)
    slaney = librosa.filters.mel(sr=16000, n_fft=1280, n_mels=80, dtype=np.float64)
    np.testing.assert_allclose(mel_filters("htk"), htk, atol=1e-12)
    np.testing.assert_allclose(mel_filters("slaney"), slaney, atol=1e-12)
    whisper = librosa.filters.mel(sr=16000, n_fft=400, n_mels=80, dtype=np.float64)
    np.testing.assert_allclose(mel_filters("slaney", 400), whisper, atol=1e-12)


@pytest.mark.parametrize("filterbank", ["htk", "slaney"])
def test_mel_equals_librosas(filterbank: Filterbank) -> None:
    pcm = to_pcm(noise(640 * 20))
    mel = Mel(MelConfig(filterbank=filterbank)).run(Item(CLIP, {"wav": pcm}))["mel"]
    check_value(FIELDS["mel"], mel, 20)
    expected = librosa.feature.melspectrogram(
        y=np.pad(pcm / 32768, 480, mode="reflect"),
        sr=16000,
        n_fft=1280,
        hop_length=320,
        n_mels=80,
        power=1.0,
        center=False,
        htk=filterbank == "htk",
        norm=None if filterbank == "htk" else "slaney",
    )
    np.testing.assert_allclose(mel, np.log(np.maximum(expected, 1e-5)).T, atol=1e-4)


@settings(max_examples=30)
@given(st.integers(1, 60))
def test_two_mel_frames_per_video_frame(frames: int) -> None:
    assert log_mel(noise(640 * frames)).shape == (2 * frames, 80)


def test_mel_frame_k_is_centred_on_sample_320_k_plus_160() -> None:
    for k in (2, 7):
        loudness = []
        for at in range(320 * k + 150, 320 * k + 171):
            click = np.zeros(640 * 10)
            click[at] = 1
            loudness.append(np.abs(stft(click)[k]).sum())
        assert int(np.argmax(loudness)) == 10


def test_silence_is_the_floor_and_level_shifts_the_log() -> None:
    assert np.allclose(log_mel(np.zeros(640 * 3)), np.log(1e-5))
    wave = noise(640 * 10)
    np.testing.assert_allclose(log_mel(2 * wave) - log_mel(wave), np.log(2), atol=1e-5)


def test_a_signal_too_short_to_reflect_is_refused() -> None:
    with pytest.raises(ValueError, match="480"):
        log_mel(np.zeros(480))


# Energy


def test_energy_definitions() -> None:
    mel = np.random.default_rng(0).normal(-1, 2, (40, 80)).astype(np.float32)
    norm = np.array([sum(np.exp(float(x)) ** 2 for x in row) ** 0.5 for row in mel])
    expected = {
        "log_norm": np.log(norm),
        "norm": norm,
        "norm_of_log": np.array([sum(float(x) ** 2 for x in row) ** 0.5 for row in mel]),
        "standardised": (norm - norm.mean()) / norm.std(),
    }
    for kind, values in expected.items():
        made = Energy(EnergyConfig(kind=kind)).run(Item(CLIP, {"mel": mel}))["energy"]
        check_value(FIELDS["energy"], made, 20)
        np.testing.assert_allclose(made, values, rtol=1e-4, atol=1e-5)


def test_energy_of_silence_is_finite() -> None:
    floor = np.full((4, 80), np.log(1e-5), np.float32)
    np.testing.assert_allclose(energy(floor), np.log(1e-5 * np.sqrt(80)), rtol=1e-5)
    assert np.array_equal(energy(floor, "standardised"), np.zeros(4, np.float32))


# Pitch


@pytest.mark.parametrize("hertz", [90.0, 160.0, 330.0])
def test_pitch_of_a_voice_like_tone(hertz: float) -> None:
    n = np.arange(640 * 25)
    tone = sum(np.cos(2 * np.pi * hertz * h * n / 16000 + h) / h for h in range(1, 10))
    pitch = Pitch(PitchConfig()).run(wav_item(0.1 * tone))["pitch"]
    check_value(FIELDS["pitch"], pitch, 25)
    assert np.isfinite(pitch[2:-2]).all()
    np.testing.assert_allclose(pitch[2:-2], hertz, rtol=0.006)  # a tenth of a semitone, pYIN's grid


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 30))
def test_two_pitch_frames_per_video_frame(frames: int) -> None:
    assert Pitch(PitchConfig()).run(wav_item(noise(640 * frames)))["pitch"].shape == (2 * frames,)


def test_pitch_follows_a_step_at_the_mel_frame_where_it_happens() -> None:
    n = np.arange(640 * 30)
    step = 640 * 15  # between acoustic frames 29 and 30
    phase = 2 * np.pi * np.cumsum(np.where(n < step, 120.0, 240.0)) / 16000
    tone = sum(np.cos(h * phase) / h for h in range(1, 8))
    pitch = Pitch(PitchConfig()).run(wav_item(0.1 * tone))["pitch"]
    assert np.nanmax(np.abs(pitch[2:28] - 120)) < 3
    assert np.nanmax(np.abs(pitch[32:-2] - 240)) < 3


@pytest.mark.parametrize("sound", [np.zeros(6400), noise(6400)])
def test_pitch_survives_a_clip_without_voice(sound: np.ndarray) -> None:
    pitch = Pitch(PitchConfig()).run(wav_item(sound))["pitch"]
    assert np.isnan(pitch).all()
    for mode in ("zero", "voiced", "interpolate"):
        assert np.array_equal(standardise(pitch, mode), np.zeros(20, np.float32))


@pytest.mark.parametrize(
    "settings_", [{"fmin": 20}, {"fmin": 300, "fmax": 200}, {"fmax": 9000}, {"fmin": 200, "fmax": 300}]
)
def test_impossible_pitch_ranges_are_refused(settings_: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        PitchConfig(**settings_)


def test_three_readings_of_standardised_pitch() -> None:
    f0 = np.array([np.nan, 100, np.nan, np.nan, 160, 140, np.nan], np.float32)
    zero = np.array([0, 100, 0, 0, 160, 140, 0.0])
    np.testing.assert_allclose(standardise(f0), (zero - zero.mean()) / zero.std(), atol=1e-5)
    voiced = np.array([100, 160, 140.0])
    expected = np.zeros(7)
    expected[[1, 4, 5]] = (voiced - voiced.mean()) / voiced.std()
    np.testing.assert_allclose(standardise(f0, "voiced"), expected, atol=1e-5)
    lines = np.array([100, 100, 120, 140, 160, 140, 140.0])
    np.testing.assert_allclose(standardise(f0, "interpolate"), (lines - lines.mean()) / lines.std(), atol=1e-5)


def test_constant_pitch_standardises_to_finite_values() -> None:
    for mode in ("zero", "voiced", "interpolate"):
        assert np.allclose(standardise(np.full(9, 120, np.float32), mode), 0)

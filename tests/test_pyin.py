"""Our pYIN gives what librosa's gives: the same f0, voiced flags and probabilities, to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import librosa
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.media import decode_audio
from pipeline.pyin import pyin
from pipeline.stages.pitch import PitchConfig, track_pitch

RATE = 16000
SECONDS = np.arange(RATE // 2) / RATE
NARROW, WIDE = (65.0, 600.0), (65.0, 2093.0)


def assert_same(wave: np.ndarray, fmin: float, fmax: float, **settings: Any) -> np.ndarray:
    settings = {"sr": RATE, "frame_length": 1280, "hop_length": 320, **settings}
    ours = pyin(wave, fmin=fmin, fmax=fmax, **settings)
    theirs = librosa.pyin(wave, fmin=fmin, fmax=fmax, center=False, **settings)
    for mine, expected in zip(ours, theirs, strict=True):
        assert mine.dtype == expected.dtype
        np.testing.assert_array_equal(mine, expected)
    return ours[0]


def _noise(scale: float) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(len(SECONDS)) * scale


def _tone(hertz: float) -> np.ndarray:
    return np.sin(2 * np.pi * hertz * SECONDS)


SOUNDS: dict[str, Callable[[], np.ndarray]] = {
    "silence": lambda: np.zeros(len(SECONDS)),
    "white noise": lambda: _noise(0.1),
    "tone": lambda: 0.5 * _tone(220.0),
    "tone above the narrow range": lambda: 0.5 * _tone(1234.5),
    "chirp": lambda: 0.3 * np.sin(2 * np.pi * (60 * SECONDS + 900 * SECONDS**2)),
    "sawtooth": lambda: (SECONDS * 130) % 1 - 0.5,
    "octave jumps": lambda: np.sin(2 * np.pi * np.cumsum(np.where(SECONDS * 8 % 2 < 1, 150, 300)) / RATE),
    "clipped": lambda: np.clip(3 * _tone(180.0) + _noise(0.05), -1, 1),
    "constant": lambda: np.full(len(SECONDS), 0.5),
    "tone on an offset": lambda: 0.1 * _tone(180.0) + 0.7,
    "very quiet": lambda: 1e-5 * _tone(180.0),
    "squares underflow": lambda: 1e-22 * _tone(180.0),
    "subnormal": lambda: _noise(1e-40),
    "squares overflow": lambda: 1e25 * _tone(180.0),
    "clicks": lambda: (np.arange(len(SECONDS)) % 100 == 0).astype(float),
    "voice that breaks off": lambda: _tone(140.0) ** 5 * (SECONDS % 0.25 < 0.15) + _noise(0.003),
}


@pytest.mark.parametrize("limits", [NARROW, WIDE], ids=["narrow", "wide"])
@pytest.mark.parametrize("name", SOUNDS)
@pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")
def test_equals_librosa_on_synthetic_sound(name: str, limits: tuple[float, float]) -> None:
    assert_same(np.pad(SOUNDS[name]().astype(np.float32), 480), *limits)


def test_equals_librosa_in_double_precision() -> None:
    assert_same(SOUNDS["voice that breaks off"](), *NARROW)
    assert_same(SOUNDS["white noise"](), *WIDE)


@pytest.mark.parametrize("frames", [1, 2, 3, 5, 63, 64, 65, 129])
def test_equals_librosa_for_few_frames_and_at_the_ends_of_blocks(frames: int) -> None:
    time = np.arange(1280 + 320 * (frames - 1) + 319) / RATE
    noise = np.random.default_rng(frames).standard_normal(len(time))
    wave = np.sin(2 * np.pi * 170 * time) ** 3 + 0.1 * noise
    assert len(assert_same(wave.astype(np.float32), *NARROW)) == frames


@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_equals_librosa_for_any_settings(data: st.DataObject) -> None:
    rate = data.draw(st.sampled_from([8000, 16000, 22050, 44100.0]))
    frame = data.draw(st.sampled_from([512, 1024, 1025, 2048]))
    hop = data.draw(st.integers(max(frame // 9, 60), int(0.03 * rate)))
    fmin = data.draw(st.floats(2.5 * rate / frame, 3.5 * rate / frame))
    fmax = data.draw(st.floats(2.5 * fmin, max(5 * fmin, 400)).map(lambda hertz: min(hertz, rate / 2)))
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    n = frame + hop * data.draw(st.integers(0, 25))
    hertz = np.exp(random.uniform(np.log(fmin), np.log(fmax), 3))[np.arange(n) * 3 // n]
    wave = np.sin(2 * np.pi * np.cumsum(hertz) / rate) + random.standard_normal(n) * random.choice([0, 0.01, 1])
    assert_same(wave.astype(np.float32), fmin, fmax, sr=rate, frame_length=frame, hop_length=hop)


def test_a_leap_of_pitch_beyond_all_usual_steps() -> None:
    """Six semitones between exact periods, with no multiple of a period in range that would offer a shorter way."""
    period = np.where(np.arange(RATE // 2) < RATE // 4, 85, 60)
    wave = np.where(np.arange(RATE // 2) % period < period // 2, 0.5, -0.5).astype(np.float32)
    hertz = assert_same(wave, 140.0, 600.0)
    assert {190, 270} <= set(np.round(hertz[~np.isnan(hertz)], -1).astype(int))


def test_equals_librosa_on_real_speech(clips: Path) -> None:
    heard = 0
    for file in ("01_grid_bbaf2n_25fps.mpg", "03_grid_lbax4n_portrait_rot_30fps.mp4"):
        wave = np.pad(decode_audio(str(clips / file)), 480)
        heard += int((~np.isnan(assert_same(wave, *NARROW))).sum())
        assert_same(wave[: 2 * RATE], *WIDE)
    assert heard > 50


def test_backends_of_the_stage_agree() -> None:
    wave = SOUNDS["sawtooth"]().astype(np.float32)
    assert PitchConfig().backend == "fast"
    fast, reference = (track_pitch(wave, 65.0, 600.0, backend) for backend in ("fast", "librosa"))
    assert fast.dtype == np.float32
    np.testing.assert_array_equal(fast, reference)
    assert round(float(np.nanmedian(fast))) == 130


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"wave": np.zeros(1279, np.float32)}, "less than one frame"),
        ({"wave": np.zeros((2, 4000), np.float32)}, "mono"),
        ({"wave": np.zeros(4000, np.int16)}, "int16"),
        ({"wave": np.full(4000, np.nan, np.float32)}, "finite"),
        ({"fmin": 600.0, "fmax": 65.0}, "fmin < fmax"),
        ({"fmax": 9000.0}, "sr / 2"),
        ({"fmin": 10.0}, "does not fit"),
        ({"fmin": 400.0}, "wider range"),
    ],
)
def test_refuses_what_librosa_refuses(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"wave": np.zeros(4000, np.float32), "fmin": 65.0, "fmax": 600.0, **change}
    wave = arguments.pop("wave")
    frame = {"sr": RATE, "frame_length": 1280, "hop_length": 320}
    with pytest.raises(ValueError, match=message):
        pyin(wave, **arguments, **frame)
    if wave.ndim == 1:
        with pytest.raises(librosa.util.exceptions.ParameterError):
            librosa.pyin(wave, center=False, **arguments, **frame)

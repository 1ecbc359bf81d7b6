"""Mixing channels: no voice cancels, none is halved by an empty channel, and ordinary sound stays the plain mean."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.sound import decode_audio, mix
from tests.films import Film, shoot

RATE = 16_000
rng = np.random.default_rng(7)
VOICE = (0.2 * np.sin(2 * np.pi * 220 * np.arange(RATE) / RATE) * np.hanning(RATE)).astype(np.float32)
MUSIC = rng.normal(0, 0.05, RATE).astype(np.float32)
OTHER = rng.normal(0, 0.05, RATE).astype(np.float32)
NOTHING = np.zeros(RATE, np.float32)
STEREO = ("FL", "FR")
SURROUND = ("FL", "FR", "FC", "LFE", "BL", "BR")


def weights(*channels: np.ndarray, names: tuple[str, ...] | None = None) -> list[float]:
    stacked = np.stack(channels)
    return mix([stacked], names or (STEREO if len(channels) == 2 else SURROUND[: len(channels)])).tolist()


def level(power_ratio_db: float) -> np.float32:
    return np.float32(10 ** (power_ratio_db / 20))


@pytest.mark.parametrize(
    ("left", "right", "wanted"),
    [
        (VOICE, VOICE, [1, 1]),
        (VOICE, level(-10) * VOICE, [1, 1]),
        (MUSIC, OTHER, [1, 1]),  # wide stereo
        (VOICE + MUSIC, VOICE - MUSIC, [1, 1]),  # a voice in phase, music in opposite phase: the mean is the voice
        (VOICE + 2 * MUSIC, VOICE - 2 * MUSIC, [1, 1]),
        (VOICE, -VOICE, [1, -1]),
        (level(-2) * VOICE, -VOICE, [1, -1]),  # of two that are about as loud, the first keeps its sign
        (level(-6) * VOICE, -VOICE, [-1, 1]),  # else the louder one
        (VOICE + level(-12) * MUSIC, -VOICE + level(-12) * OTHER, [1, -1]),
        (VOICE + 0.3, -VOICE - 0.1, [1, -1]),  # offsets say nothing
        (VOICE, NOTHING, [1, 0]),
        (NOTHING, VOICE, [0, 1]),
        (VOICE, NOTHING + 0.25, [1, 0]),
        (VOICE, level(-40) * MUSIC, [1, 0]),  # the hiss of an open input
        (VOICE, level(-15) * MUSIC, [1, 1]),
        (NOTHING, NOTHING, [1, 1]),
    ],
)
def test_stereo(left: np.ndarray, right: np.ndarray, wanted: list[float]) -> None:
    assert weights(left, right) == wanted


@pytest.mark.parametrize(
    ("names", "channels", "wanted"),
    [
        (("FC",), [VOICE], [1]),
        (SURROUND, [MUSIC, OTHER, VOICE, 3 * MUSIC, MUSIC, OTHER], [0, 0, 1, 0, 0, 0]),
        (SURROUND, [VOICE, VOICE, NOTHING, MUSIC, NOTHING, NOTHING], [1, 1, 0, 0, 0, 0]),
        (SURROUND, [VOICE, VOICE, level(-26) * VOICE, MUSIC, NOTHING, NOTHING], [1, 1, 1, 0, 0, 0]),
        (("FL", "FR", "LFE"), [VOICE, -VOICE, 5 * MUSIC], [1, -1, 0]),
        (("NONE",) * 4, [VOICE, level(-6) * VOICE, NOTHING, NOTHING], [1, 1, 0, 0]),  # a camera's plain inputs
        (("LFE", "LFE2", "LFE"), [VOICE, VOICE, NOTHING], [1, 1, 0]),
    ],
    ids=["mono", "centre", "empty-centre", "faint-centre", "2.1", "inputs", "low-alone"],
)
def test_other_layouts(names: tuple[str, ...], channels: list[np.ndarray], wanted: list[float]) -> None:
    assert weights(*channels, names=names) == wanted


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, RATE), max_size=4), st.floats(-1, 1))
def test_stretches_are_judged_together(cuts: list[int], blend: float) -> None:
    """The same decision however the sound is cut into stretches, and by the definition of correlation."""
    stacked = np.stack([MUSIC, np.float32(blend) * MUSIC + np.float32((1 - blend**2) ** 0.5) * OTHER])
    whole = mix([stacked], STEREO).tolist()
    assert mix(np.split(stacked, sorted(cuts), axis=1), STEREO).tolist() == whole
    correlation = np.corrcoef(stacked.astype(float))[0, 1]
    if abs(correlation + 0.8) > 1e-3:
        assert whole == [1.0, -1.0 if correlation < -0.8 else 1.0]


# ------------------------------------------------------------------------------------------------- in files


def film(tmp_path: Path, *channels: np.ndarray, layout: str = "stereo", audio: str = "pcm_s16le") -> np.ndarray:
    made = Film("mkv", "mpeg4", audio, rate=RATE, layout=layout)
    return decode_audio(str(shoot(made, tmp_path / "film.mkv", sound=np.stack(channels, 1))))


def quantised(sound: np.ndarray) -> np.ndarray:
    return (sound * 32767).astype(np.int16).astype(np.float32) / 32768


def test_ordinary_sound_is_the_mean_bit_for_bit(tmp_path: Path) -> None:
    mean = (quantised(VOICE) + quantised(MUSIC)) / 2
    np.testing.assert_array_equal(film(tmp_path, VOICE, MUSIC), mean)
    np.testing.assert_array_equal(film(tmp_path, VOICE, layout="mono"), quantised(VOICE))


@pytest.mark.parametrize("right", [-VOICE, NOTHING, level(-45) * MUSIC], ids=["opposite", "silent", "hiss"])
def test_a_voice_neither_cancels_nor_halves(tmp_path: Path, right: np.ndarray) -> None:
    np.testing.assert_allclose(film(tmp_path, VOICE, right), quantised(VOICE), atol=1e-4)


def test_surround_speaks_from_its_centre(tmp_path: Path) -> None:
    sound = film(tmp_path, MUSIC, OTHER, VOICE, MUSIC, OTHER, MUSIC, layout="5.1", audio="flac")
    np.testing.assert_array_equal(sound, quantised(VOICE))


def test_channels_are_judged_over_the_cut(tmp_path: Path) -> None:
    """In the second half the right channel carries the voice with opposite sign; in the first it is silent."""
    left, right = np.tile(VOICE, 2), np.concatenate([NOTHING, -VOICE])
    made = Film("mkv", "mpeg4", "pcm_s16le", rate=RATE, layout="stereo")
    times = [Fraction(k, 25) for k in range(50)]
    path = str(shoot(made, tmp_path / "film.mkv", times, np.stack([left, right], 1)))
    for start in (0.0, 1.0):
        np.testing.assert_allclose(decode_audio(path, start, start + 1), quantised(VOICE), atol=1e-4)

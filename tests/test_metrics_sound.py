"""Files to be judged: any rate, channels and container, and files that cannot be read."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.evaluation.sound import load_sound
from shards.errors import UserError
from tests.films import Film, shoot


def tone(rate: int, seconds: float = 0.5, pitch: float = 440.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * pitch * np.arange(round(rate * seconds)) / rate)


@pytest.mark.parametrize(
    ("rate", "channels", "ending"),
    [(8000, 1, "wav"), (44_100, 1, "flac"), (48_000, 2, "wav"), (22_050, 2, "ogg"), (44_100, 1, "mp3")],
)
def test_any_rate_becomes_16_khz_in_its_place(tmp_path: Path, rate: int, channels: int, ending: str) -> None:
    path = tmp_path / f"tone.{ending}"
    soundfile.write(path, np.repeat(tone(rate)[:, None], channels, 1), rate)
    sound = load_sound(path)
    expected = tone(16_000)
    assert sound.samples.dtype == np.float32
    assert sound.video_frames is None
    assert sound.seconds == pytest.approx(0.5, abs=0.05 if ending in ("mp3", "ogg") else 1e-4)
    inner = slice(1600, 6400)
    assert np.abs(sound.samples[inner] - expected[inner]).max() < (0.05 if ending in ("mp3", "ogg") else 0.01)


def test_a_channel_with_its_sign_turned_does_not_cancel(tmp_path: Path) -> None:
    path = tmp_path / "turned.wav"
    soundfile.write(path, np.stack([tone(16_000), -tone(16_000)], 1), 16_000)
    assert load_sound(path).peak == pytest.approx(0.5, abs=0.01)


def test_16_khz_samples_are_those_of_the_file(tmp_path: Path) -> None:
    pcm = np.array([-32768, -1, 0, 1, 32767], np.int16)
    soundfile.write(tmp_path / "a.wav", pcm, 16_000)
    assert (load_sound(tmp_path / "a.wav").samples == pcm.astype(np.float32) / 32768).all()


def test_names_need_not_be_utf_8(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", tone(16_000), 16_000)
    odd = (tmp_path / "a.wav").rename(tmp_path / os.fsdecode(b"\xff.wav"))
    assert len(load_sound(odd).samples) == 8000


def test_floats_beyond_full_scale_are_clipped_and_the_peak_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "loud.wav"
    soundfile.write(path, (3 * tone(16_000)).astype(np.float32), 16_000, subtype="FLOAT")
    sound = load_sound(path)
    assert np.abs(sound.samples).max() == 1
    assert sound.peak == pytest.approx(1.5, abs=0.01)


def test_sound_of_a_video_ends_with_its_picture(tmp_path: Path) -> None:
    film = Film("mp4", "mpeg4", "aac", rate=16_000)
    times = [Fraction(k, 25) for k in range(25)]
    longer = load_sound(shoot(film, tmp_path / "long.mp4", times, tone(16_000, 1.5)))
    assert (len(longer.samples), longer.video_frames) == (16_000, 25)
    assert longer.seconds == pytest.approx(1.5, abs=0.07)  # whole packets of 1024 samples
    shorter = load_sound(shoot(film, tmp_path / "short.mp4", times, tone(16_000, 0.6)))
    assert shorter.video_frames == 25
    assert shorter.seconds == len(shorter.samples) / 16_000 == pytest.approx(0.6, abs=0.07)


def test_a_container_without_picture_is_sound(tmp_path: Path) -> None:
    import av

    path = tmp_path / "tone.m4a"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(tone(16_000)[None].astype(np.float32), format="fltp", layout="mono")
        frame.rate = 16_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    sound = load_sound(path)
    assert sound.video_frames is None
    assert sound.seconds == pytest.approx(0.5, abs=0.13)  # whole packets of 1024 samples, and one ahead


@pytest.mark.parametrize("name", ["text.wav", "text.mp4", "empty.wav", "empty.mkv"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"" if name.startswith("empty") else b"no sound at all " * 100)
    with pytest.raises(UserError, match=name):
        load_sound(path)


def test_missing_files_folders_and_sounds_without_samples_are_named(tmp_path: Path) -> None:
    (tmp_path / "folder.wav").mkdir()
    soundfile.write(tmp_path / "none.wav", np.zeros(0), 16_000)
    nan = np.full(100, np.nan, np.float32)
    soundfile.write(tmp_path / "nan.wav", nan, 16_000, subtype="FLOAT")
    shoot(Film("mkv", "mpeg4"), tmp_path / "mute.mkv")
    for name, said in {
        "gone.wav": "no such file",
        "folder.wav": "no such file",
        "none.wav": "holds no sound",
        "nan.wav": "100 samples are not finite",
        "mute.mkv": "no sound stream",
    }.items():
        with pytest.raises(UserError, match=f"{name}: .*{said}"):
            load_sound(tmp_path / name)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    length=st.integers(1, 5000),
    rate=st.sampled_from([8000, 11_025, 16_000, 44_100, 96_000]),
    channels=st.integers(1, 3),
)
def test_the_length_is_that_of_the_file_at_16_khz(tmp_path: Path, length: int, rate: int, channels: int) -> None:
    path = tmp_path / "any.wav"
    soundfile.write(path, np.random.default_rng(length).uniform(-1, 1, (length, channels)), rate)
    sound = load_sound(path)
    assert abs(len(sound.samples) - length * 16_000 / rate) < 1
    assert np.abs(sound.samples).max() <= 1

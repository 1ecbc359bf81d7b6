"""Decoding: exact 25 Hz grid, upright pictures, sound on the video's clock, nothing opened but the named file."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.media import _on_grid, count_frames, decode_audio, decode_video
from pipeline.stage import Reason, Reject
from shards.errors import UserError

MILLISECOND = Fraction(1, 1000)
FRAMES_25 = range(0, 2000, 40)


def write(
    path: Path,
    times_ms: Sequence[int] = FRAMES_25,
    sound: np.ndarray | None = None,
    sound_at: float = 0.0,
    size: tuple[int, int] = (64, 48),
    rotate: int = 0,
    rate: int = 16_000,
    codec: str = "mpeg4",
) -> Path:
    """A film whose frame k shows k in binary below a bright bar, frames at the given milliseconds, PCM sound."""
    with av.open(str(path), "w") as container:
        if times_ms:
            video = container.add_stream(codec, rate=25)
            video.width, video.height, video.pix_fmt = *size, "yuv420p"
            video.codec_context.time_base = (
                Fraction(1, 25) if codec == "mpeg2video" or path.suffix == ".avi" else MILLISECOND
            )
            video.codec_context.qmin = video.codec_context.qmax = 2
            video.codec_context.gop_size = 5
            if rotate:
                video.set_display_rotation(rotate)
        if sound is not None:
            layout = "stereo" if sound.ndim == 2 else "mono"
            audio = container.add_stream("pcm_s16le", rate=rate, layout=layout)
        for k, time in enumerate(times_ms):
            bits = np.repeat([50 + 150 * (k >> bit & 1) for bit in range(8)], size[0] // 8)
            picture = np.empty((size[1], size[0], 3), np.uint8)
            picture[:] = bits[None, :, None]
            picture[: size[1] // 3] = 255
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = time, MILLISECOND
            container.mux(video.encode(frame))
        if times_ms:
            container.mux(video.encode(None))
        if sound is not None:
            for at in range(0, len(sound), 1600):
                samples = (sound[at : at + 1600] * 32767).astype(np.int16).reshape(1, -1)
                frame = av.AudioFrame.from_ndarray(samples, format="s16", layout=layout)
                frame.sample_rate, frame.time_base = rate, Fraction(1, rate)
                frame.pts = round(sound_at * rate) + at
                container.mux(audio.encode(frame))
            container.mux(audio.encode(None))
    return path


def indices(frames: Sequence[np.ndarray]) -> list[int]:
    """The number that each frame shows."""
    bits = [frame[-16:].mean((0, 2)).reshape(8, -1).mean(1) > 125 for frame in frames]
    return [int(np.packbits(bit, bitorder="little")[0]) for bit in bits]


def tone(seconds: float, rate: int = 16_000) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * 440 * np.arange(round(seconds * rate)) / rate)


def onset(sound: np.ndarray) -> float:
    """Seconds until the first sample of note."""
    return int(np.flatnonzero(np.abs(sound) > 0.02)[0]) / 16_000


def rejected(reason: Reason, uri: Path | str, both: bool = True) -> str:
    with pytest.raises(Reject) as caught:
        list(decode_video(str(uri)))
    assert caught.value.reason is reason
    if both:
        with pytest.raises(Reject) as counted:
            count_frames(str(uri))
        assert counted.value.reason is reason
    return str(caught.value)


# ---------------------------------------------------------------------------------------------- the grid


def test_25_fps_passes_unchanged(tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.mp4"))
    assert indices(list(decode_video(path))) == list(range(50))
    assert count_frames(path) == 50


def test_variable_rate_shows_the_frame_of_the_moment(tmp_path: Path) -> None:
    times = [0, 33, 70, 120, 280, 300, 333, 480, 500]
    path = str(write(tmp_path / "a.mkv", times))
    expected = [max(k for k, t in enumerate(times) if t <= 40 * n) for n in range(13)]
    assert indices(list(decode_video(path)))[:13] == expected


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "a.mpg", "a.ts", "a.mov"])
def test_every_container_gives_the_same_frames(tmp_path: Path, name: str) -> None:
    codec = "mpeg2video" if name in ("a.mpg", "a.ts") else "mpeg4"
    path = str(write(tmp_path / name, codec=codec))
    frames = list(decode_video(path))
    assert indices(frames) == list(range(50))
    assert count_frames(path) == len(frames)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(1, 200), min_size=1, max_size=60),
    st.integers(0, 10**6),
    st.integers(0, 3000),
    st.one_of(st.none(), st.integers(20, 3000)),
)
def test_grid_against_its_definition(steps: list[int], origin: int, start: int, length: int | None) -> None:
    edges = np.concatenate([[0], np.cumsum(steps)]).tolist()  # milliseconds
    frames = [
        (None, (origin + at) * MILLISECOND, step * MILLISECOND, k)
        for k, (at, step) in enumerate(zip(edges, steps, strict=False))
    ]
    end = None if length is None else start + length
    span = edges[-1] - start if end is None else length
    count = math.floor(Fraction(span, 40) + Fraction(1, 2))
    complete = edges[-1] >= (end if end is not None else start + 20)
    if not complete:
        return
    grid = [start + 40 * n for n in range(count)]
    expected = [max(k for k, at in enumerate(edges[:-1]) if at <= time + 1) for time in grid]
    exact = None if end is None else Fraction(end, 1000)
    got = list(_on_grid(iter(frames), "film", Fraction(start, 1000), exact))  # type: ignore[arg-type]
    assert got == expected


# ------------------------------------------------------------------------------------------------- cuts


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
def test_cut_equals_slice_of_the_whole(tmp_path: Path, name: str) -> None:
    path = str(write(tmp_path / name, range(0, 8000, 40), tone(8.0)))
    whole = np.stack(list(decode_video(path)))
    part = np.stack(list(decode_video(path, 5.2, 6.4)))
    np.testing.assert_array_equal(part, whole[130:160])
    assert count_frames(path, 5.2, 6.4) == 30
    sound = decode_audio(path, 5.2, 6.4)
    assert len(sound) == 30 * 640
    np.testing.assert_allclose(sound[100:-100], decode_audio(path)[130 * 640 : 160 * 640][100:-100], atol=2e-3)


def test_cut_beyond_the_end(tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.mp4"))
    for action in (lambda: list(decode_video(path, 1.0, 5.0)), lambda: count_frames(path, 1.0, 5.0)):
        with pytest.raises(Reject, match="asks for") as caught:
            action()
        assert caught.value.reason is Reason.TRUNCATED


@pytest.mark.parametrize(("start", "end"), [(2.0, 1.0), (1.0, 1.0), (-1.0, None)])
def test_cut_without_sense(tmp_path: Path, start: float, end: float | None) -> None:
    path = str(write(tmp_path / "a.mp4"))
    with pytest.raises(Reject, match="start must be"):
        list(decode_video(path, start, end))


# ----------------------------------------------------------------------------------------------- upright


@pytest.mark.parametrize(
    ("rotate", "where"),
    # PyAV's angle counts counter-clockwise; the bar is on top of the coded picture.
    [(0, np.s_[:8, :]), (90, np.s_[:, :8]), (180, np.s_[-8:, :]), (-90, np.s_[:, -8:])],
)
def test_rotation(tmp_path: Path, rotate: int, where: tuple[slice, slice]) -> None:
    path = str(write(tmp_path / "a.mp4", range(0, 200, 40), rotate=rotate))
    frame = next(decode_video(path))
    assert frame.shape == ((64, 48, 3) if rotate in (90, -90) else (48, 64, 3))
    assert frame[where].mean() > 240
    assert frame.mean() < 150


# ------------------------------------------------------------------------------------------------- sound


def test_late_sound_has_zeros_in_front(tmp_path: Path) -> None:
    sound = decode_audio(str(write(tmp_path / "a.mkv", sound=tone(1.0), sound_at=0.5)))
    assert len(sound) == pytest.approx(24_000, abs=20)
    assert not sound[:7900].any()
    assert onset(sound) == pytest.approx(0.5, abs=0.002)


def test_early_sound_is_cut(tmp_path: Path) -> None:
    beep = np.concatenate([np.zeros(16_000), tone(1.0)])  # the beep begins 1 s after the sound does
    path = write(tmp_path / "a.mkv", [400 + t for t in FRAMES_25], beep)
    sound = decode_audio(str(path))
    assert len(sound) == pytest.approx(32_000 - 6400, abs=20)
    assert onset(sound) == pytest.approx(0.6, abs=0.002)


def test_stereo_is_the_plain_mean_and_rates_are_converted(tmp_path: Path) -> None:
    left, right = tone(1.0, 44_100), -0.5 * tone(1.0, 44_100)[::-1]
    path = write(tmp_path / "a.mkv", range(0, 1000, 40), np.stack([left, right], 1), rate=44_100)
    sound = decode_audio(str(path))
    assert sound.dtype == np.float32
    assert len(sound) == pytest.approx(16_000, abs=20)
    expected = (tone(1.0) - 0.5 * np.sin(2 * np.pi * 440 * (1 - 1 / 44_100 - np.arange(16_000) / 16_000)) / 2) / 2
    np.testing.assert_allclose(sound[200:15_800], expected[200:15_800], atol=2e-3)


def test_no_sound(tmp_path: Path) -> None:
    with pytest.raises(Reject) as caught:
        decode_audio(str(write(tmp_path / "a.mp4")))
    assert caught.value.reason is Reason.NO_AUDIO


def test_no_picture(tmp_path: Path) -> None:
    rejected(Reason.NO_VIDEO, write(tmp_path / "a.mkv", (), tone(1.0)))


# ---------------------------------------------------------------------------------------- unusable files


def test_missing_empty_and_foreign_files(tmp_path: Path) -> None:
    assert "check the path" in rejected(Reason.UNREADABLE, tmp_path / "none.mp4")
    (tmp_path / "empty.mp4").touch()
    rejected(Reason.UNREADABLE, tmp_path / "empty.mp4")
    (tmp_path / "text.mp4").write_text("no film\n" * 1000)
    rejected(Reason.UNREADABLE, tmp_path / "text.mp4")
    rejected(Reason.UNREADABLE, tmp_path)
    with pytest.raises(UserError, match="no such storage"):
        list(decode_video("ftp://example.org/a.mp4"))
    os.mkfifo(tmp_path / "fifo.mp4")
    rejected(Reason.UNREADABLE, tmp_path / "fifo.mp4")


@pytest.mark.parametrize("keep", [0.4, 0.6, 0.8])
@pytest.mark.parametrize("name", ["a.mkv", "a.avi", "a.mp4"])
def test_cut_file_is_never_taken_for_whole(tmp_path: Path, name: str, keep: float) -> None:
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 32_000)
    data = write(tmp_path / name, sound=noise).read_bytes()
    cut = tmp_path / f"cut_{name}"
    cut.write_bytes(data[: int(len(data) * keep)])

    def both() -> None:  # either stream may be the one that breaks off
        list(decode_video(str(cut)))
        decode_audio(str(cut))

    with pytest.raises(Reject) as caught:
        both()
    assert caught.value.reason in (Reason.TRUNCATED, Reason.UNREADABLE)


@pytest.mark.parametrize(
    "text",
    [
        "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{inner}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile '{inner}'\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
        '<?xml version="1.0"?><MPD type="static"><Period><AdaptationSet><Representation><BaseURL>{inner}</BaseURL>'
        "</Representation></AdaptationSet></Period></MPD>",
    ],
    ids=["hls", "ffconcat", "sdp", "dash"],
)
@pytest.mark.parametrize("ending", ["mp4", "m3u8", "ffconcat", "sdp", "mpd"])
def test_playlists_open_nothing(tmp_path: Path, text: str, ending: str) -> None:
    inner = write(tmp_path / "inner.ts", codec="mpeg2video")
    untouched = (0, os.stat(inner).st_mtime_ns)
    os.utime(inner, ns=untouched)
    inner.read_bytes()
    if os.stat(inner).st_atime_ns == 0:
        pytest.skip("this file system keeps no access times")
    os.utime(inner, ns=untouched)
    path = tmp_path / f"list.{ending}"
    path.write_text(text.format(inner=inner))
    rejected(Reason.UNREADABLE, path)
    with pytest.raises(Reject):
        decode_audio(str(path))
    assert os.stat(inner).st_atime_ns == 0


def test_image_sequence_pattern_is_a_plain_name(tmp_path: Path) -> None:
    for k in range(3):
        (tmp_path / f"{k}.png").write_bytes(b"\x89PNG")
    rejected(Reason.UNREADABLE, tmp_path / "%d.png")


def test_name_may_hold_anything(tmp_path: Path) -> None:
    odd = tmp_path / "concat:a%d ?#'.mp4"
    shutil.copy(write(tmp_path / "a.mp4"), odd)
    assert count_frames(str(odd)) == 50


# -------------------------------------------------------------------------------------------- real clips


@pytest.mark.parametrize(
    ("prefix", "frames", "shape"),
    [
        ("01", 75, (288, 360, 3)),
        ("02", 75, (288, 360, 3)),  # 23.976 fps, 3.003 s
        ("03", 75, (960, 540, 3)),  # 30 fps, coded lying
        ("08", 150, (288, 720, 3)),
        ("09", 160, (540, 960, 3)),  # variable rate, 6.402 s
        ("13", 75, (288, 360, 3)),  # variable rate
        ("14", 100, (360, 640, 3)),  # 23.976 fps, 4.004 s
        ("15", 75, (288, 360, 3)),
    ],
)
def test_real_clips(clips: Path, prefix: str, frames: int, shape: tuple[int, ...]) -> None:
    path = str(next(clips.glob(f"{prefix}_*")))
    shapes = [frame.shape for frame in decode_video(path)]
    assert shapes == [shape] * frames
    assert count_frames(path) == frames


def test_real_truncated_clips(clips: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rejected(Reason.UNREADABLE, next(clips.glob("11_*")))
    rejected(Reason.TRUNCATED, next(clips.glob("12_*")))
    with pytest.raises(Reject) as caught:
        decode_audio(str(next(clips.glob("12_*"))))
    assert caught.value.reason is Reason.TRUNCATED
    assert capfd.readouterr().err == ""


def test_real_late_sound_is_late_by_240_ms(clips: Path) -> None:
    straight = decode_audio(str(next(clips.glob("03_*"))))
    late = decode_audio(str(next(clips.glob("15_*"))))
    length = 2**17
    spectrum = np.fft.rfft(late, length) * np.conj(np.fft.rfft(straight, length))
    shift = int(np.argmax(np.fft.irfft(spectrum, length)))
    assert shift / 16_000 == pytest.approx(0.240, abs=0.005)


def test_real_sound_that_begins_late_and_a_silent_track(clips: Path) -> None:
    sound = decode_audio(str(next(clips.glob("09_*"))))
    begin = int(np.flatnonzero(sound)[0]) / 16_000
    assert begin == pytest.approx(2.43, abs=0.03)
    assert len(sound) / 16_000 == pytest.approx(6.4, abs=0.1)
    silent = decode_audio(str(next(clips.glob("14_*"))))
    assert len(silent) / 16_000 == pytest.approx(4.0, abs=0.1)
    assert not silent.any()

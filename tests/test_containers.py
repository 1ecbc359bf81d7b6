"""Containers, codecs and clocks: the right frame at each moment, and the sound at its place, in whatever users have."""

from __future__ import annotations

import math
import struct
from bisect import bisect_right
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from pipeline.media import count_frames, decode_audio, decode_video
from pipeline.stage import Reason, Reject
from tests.films import FRAMES, Film, click, indices, lag, shoot

BIG = (256, 144)
FRAGMENTS = {"movflags": "frag_keyframe+empty_moov+delay_moov+default_base_moof"}
SAMPLE, MILLISECOND = 1.0, 16.0
UNSAID = 90.0
"""AVI and RealMedia say nothing of the delay of a codec: 5.3 ms of AC-3, 10 ms of MP2 stay in."""

FILMS = [
    Film("mp4", "libx264", "aac"),
    Film("mp4", "libx264", "aac", container=FRAGMENTS),
    Film("mp4", "libx265", "libmp3lame", options={"x265-params": "log-level=none"}),
    Film("mp4", "libvpx-vp9", "flac"),
    Film("mp4", "mpeg4", "ac3"),
    Film("mp4", "mjpeg", "alac", pixels="yuvj420p"),
    Film("m4v", "mpeg2video", "eac3", format="mp4"),
    Film("mov", "prores_ks", "pcm_s16le", pixels="yuv422p10le"),
    Film("mov", "dnxhd", "pcm_s24le", size=BIG, pixels="yuv422p", options={"profile": "dnxhr_lb"}),
    Film("mov", "cfhd", "pcm_f32le", size=BIG, pixels="yuv422p10le"),
    Film("mov", "svq1", "adpcm_ima_qt", pixels="yuv410p"),
    Film("mov", "qtrle", "pcm_s16be", pixels="rgb24"),
    Film("mkv", "ffv1", "flac"),
    Film("mkv", "libx265", "libopus", options={"x265-params": "log-level=none"}),
    Film("mkv", "snow", "wavpack"),
    Film("mkv", "rawvideo", "libmp3lame"),
    Film("webm", "libvpx", "vorbis", layout="stereo"),
    Film("webm", "libvpx-vp9", "libopus"),
    Film("avi", "libx264", "pcm_s16le"),  # frames that are shown in another order than they are stored
    Film("avi", "mpeg4", "pcm_u8", options={"bf": "2"}),
    Film("avi", "huffyuv", "adpcm_ms", pixels="yuv422p"),
    Film("avi", "msmpeg4", "ac3", every_frame_whole=True, lag=UNSAID),
    Film("mpg", "mpeg1video", "mp2"),
    Film("vob", "mpeg2video", "ac3"),
    Film("ts", "libx264", "aac"),
    Film("m2ts", "libx265", "ac3", options={"x265-params": "log-level=none"}),
    Film("ts", "mpeg2video", "libopus"),
    Film("flv", "flv", "libmp3lame", rate=44_100, lag=MILLISECOND),
    Film("flv", "libx264", "aac", lag=MILLISECOND),
    Film("wmv", "wmv2", "wmav2", lag=MILLISECOND),
    Film("asf", "wmv1", "wmav1", lag=MILLISECOND),
    Film("3gp", "h263", "libopencore_amrnb", size=(176, 144), rate=8000, lag=MILLISECOND),
    Film("mxf", "mpeg2video", "pcm_s16le"),
    Film("mxf", "libx264", "pcm_s24le"),
    Film("dv", "dvvideo", "pcm_s16le", size=(720, 576), layout="stereo"),
    Film("ogv", "libvpx", "vorbis", layout="stereo"),
    Film("rm", "rv20", "ac3", every_frame_whole=True, lag=UNSAID),
    Film("wtv", "mpeg2video", "mp2"),
    Film("nut", "mpeg4", "pcm_s16le"),
    Film("mp4", "libsvtav1", size=(64, 64)),
    Film("ivf", "libvpx"),
    Film("h264", "libx264"),
    Film("hevc", "libx265", options={"x265-params": "log-level=none"}),
    Film("m2v", "mpeg2video", format="mpeg2video"),
    Film("y4m", "wrapped_avframe"),
    Film("gif", "gif", pixels="rgb8"),
]


@pytest.mark.parametrize("film", FILMS, ids=str)
def test_frames_and_sound_are_in_place(tmp_path: Path, film: Film) -> None:
    path = str(shoot(film, tmp_path / f"film.{film.ending}"))
    assert indices(list(decode_video(path))) == list(range(FRAMES))
    assert count_frames(path) == FRAMES
    if film.audio is not None:
        assert abs(lag(decode_audio(path))) <= film.lag


@pytest.mark.parametrize("ending", ["h264", "mjpeg", "y4m", "ts", "mpg", "dv", "mxf", "gif", "rm", "av1", "m4v"])
def test_other_bytes_under_an_ending_are_refused(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"film.{ending}"
    random = np.random.default_rng(3).bytes(30_000)
    for data in (random, bytes(30_000), b"no film\n" * 3000, b"PK\3\4" + random):
        path.write_bytes(data)
        for read in (lambda: list(decode_video(str(path))), lambda: decode_audio(str(path))):
            with pytest.raises(Reject) as caught:
                read()
            assert caught.value.reason in (Reason.UNREADABLE, Reason.NO_VIDEO)


# ----------------------------------------------------------------------------------------------- frame rates


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
@pytest.mark.parametrize(
    "rate",
    ["10", "25/2", "15", "24000/1001", "24", "30000/1001", "30", "48", "50", "60000/1001", "60", "120"],
)
def test_every_rate_shows_the_frame_of_the_moment(tmp_path: Path, ending: str, rate: str) -> None:
    step = 1 / Fraction(rate)
    times = [k * step for k in range(math.ceil(2 / step))]
    path = str(shoot(Film(ending, "mpeg4"), tmp_path / f"film.{ending}", times))
    length = len(times) * step
    if ending == "mkv":
        times = [Fraction(round(1000 * time), 1000) for time in times]
    late = Fraction(1, 1000)  # that a frame may come and still count as on time
    wanted = [bisect_right(times, Fraction(n, 25) + late) - 1 for n in range(round(length * 25))]
    assert indices(list(decode_video(path))) == wanted
    assert count_frames(path) == len(wanted)


def test_a_gap_holds_the_frame_before_it(tmp_path: Path) -> None:
    times = [Fraction(t, 1000) for t in (0, 40, 80, 700, 740, 2000, 2040)]
    for ending in ("mp4", "mkv"):
        path = str(shoot(Film(ending, "mpeg4"), tmp_path / f"film.{ending}", times))
        wanted = [max(k for k, time in enumerate(times) if time <= Fraction(n, 25)) for n in range(52)]
        assert indices(list(decode_video(path))) == wanted


# ------------------------------------------------------------------------------------------------ edit lists


def edit(path: Path, track: int, edits: list[tuple[int, int]]) -> None:
    """Replace the edit list of a track: (milliseconds shown, first time in units of the media or -1 for nothing)."""
    data = bytearray(path.read_bytes())
    at = -1
    for _ in range(track + 1):
        at = data.index(b"elst", at + 1)
    assert struct.unpack(">I", data[at - 4 : at])[0] == 16 + 12, "the muxer wrote one edit"
    body = struct.pack(">II", 0, len(edits)) + b"".join(struct.pack(">Iii", *e, 65536) for e in edits)
    grown = len(body) - 20
    for name, place in ((b"elst", at), (b"edts", at - 8)):
        size = struct.unpack(">I", data[place - 4 : place])[0]
        assert data[place : place + 4] == name
        data[place - 4 : place] = struct.pack(">I", size + grown)
    for name in (b"trak", b"moov"):
        place = data.rindex(name, 0, at)
        data[place - 4 : place] = struct.pack(">I", struct.unpack(">I", data[place - 4 : place])[0] + grown)
    data[at + 4 : at + 24] = body
    path.write_bytes(data)


FILM = Film("mp4", "libx264", "aac", options={"g": "5", "bf": "2"})


def starts(path: Path, track: int) -> int:
    """First time that the edit list of a track shows, in units of its media."""
    data = path.read_bytes()
    at = -1
    for _ in range(track + 1):
        at = data.index(b"elst", at + 1)
    return int(struct.unpack(">i", data[at + 16 : at + 20])[0])


def test_edit_list_that_skips_the_first_frames(tmp_path: Path) -> None:
    path = shoot(FILM, tmp_path / "film.mp4")
    unit = 12_800 // 25
    for skipped in (10, 12):  # with and without a key frame at the cut
        skip = shoot(FILM, tmp_path / f"skip{skipped}.mp4")
        edit(skip, 0, [(1000 - 40 * skipped, starts(path, 0) + skipped * unit)])
        assert indices(list(decode_video(str(skip)))) == list(range(skipped, 25))
        assert count_frames(str(skip)) == 25 - skipped
        # The sound's own edit is as it was: its click is 0.48 s after the first frame that is shown.
        assert abs(lag(decode_audio(str(skip)))) <= SAMPLE


def test_edit_list_that_skips_the_first_sound(tmp_path: Path) -> None:
    path = shoot(FILM, tmp_path / "film.mp4")
    edit(path, 1, [(800, starts(path, 1) + 9600)])  # 0.2 s at 48 kHz, after the encoder's own delay
    assert indices(list(decode_video(str(path)))) == list(range(FRAMES))
    assert abs(lag(decode_audio(str(path)), 0.28)) <= SAMPLE


@pytest.mark.parametrize("late", [0.0, 0.24])
def test_encoder_delay_is_no_delay(tmp_path: Path, late: float) -> None:
    """AAC begins with 1024 samples of nothing, which an edit list skips; a late start is an empty edit before it."""
    path = str(shoot(FILM, tmp_path / "film.mp4", sound_at=late))
    sound = decode_audio(path)
    assert abs(lag(sound) - late * 16_000) <= (MILLISECOND if late else SAMPLE)  # mp4 counts empty edits in ms
    assert not sound[: round((late - 0.02) * 16_000)].any() or not late


@pytest.mark.parametrize("ending", ["mp4", "mov", "mkv", "ts"])
def test_picture_that_begins_after_the_sound(tmp_path: Path, ending: str) -> None:
    film = Film(ending, "libx264", "aac", options={"bf": "2"})
    times = [Fraction(k, 25) for k in range(8, 33)]
    path = str(shoot(film, tmp_path / f"film.{ending}", times))
    assert indices(list(decode_video(path))) == list(range(FRAMES))
    assert abs(lag(decode_audio(path), 0.48 - 0.32)) <= SAMPLE


def test_cuts_keep_sound_and_picture_together(tmp_path: Path) -> None:
    """Frame 12 comes up with the click, wherever a cut begins."""
    film = Film("mp4", "libx264", "aac", options={"bf": "2"})
    times = [Fraction(k, 25) for k in range(200)]
    path = str(shoot(film, tmp_path / "film.mp4", times, click(48_000, 8.0, 5.48)))
    for start in (0.2, 3.0, 5.0, 5.4):
        assert indices(list(decode_video(path, start, 6.0)))[0] == round(start * 25)
        assert abs(lag(decode_audio(path, start, 6.0), 5.48 - start)) <= SAMPLE

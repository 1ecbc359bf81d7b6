"""Pictures as they are meant to be seen: square pixels, whole frames, upright."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from pipeline.media import count_frames, decode_video
from pipeline.pixels import upright
from pipeline.stage import Reason, Reject
from tests.films import FRAMES, Film, indices, shoot


def encode(path: Path, pictures: Iterator[np.ndarray], options: dict[str, str], turn: int = 0) -> Path:
    with av.open(str(path), "w") as container:
        video = None
        for number, picture in enumerate(pictures):
            if video is None:
                video = container.add_stream("libx264", rate=25, options=options)
                video.height, video.width, video.pix_fmt = *picture.shape[:2], "yuv420p"
                video.codec_context.thread_count = 1
                if turn:
                    video.set_display_rotation(turn)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
    return path


# ----------------------------------------------------------------------------------------- shape of a pixel


@pytest.mark.parametrize(
    ("film", "aspect", "shape"),
    [
        (Film("mp4", "libx264"), Fraction(4, 3), (48, 85)),  # HDV, 1440x1080 for 16:9
        (Film("mkv", "libx264"), Fraction(8, 9), (48, 57)),  # NTSC, 720x480 for 4:3
        (Film("mpg", "mpeg2video", size=(720, 576)), Fraction(64, 45), (576, 1024)),  # PAL 16:9
        (Film("dv", "dvvideo", size=(720, 576)), Fraction(16, 15), (576, 768)),
        (Film("mp4", "libx264"), Fraction(1, 1), (48, 64)),
        (Film("mp4", "libx264"), Fraction(200, 199), (48, 64)),  # rounding, no shape
    ],
    ids=str,
)
def test_pixels_come_out_square(tmp_path: Path, film: Film, aspect: Fraction, shape: tuple[int, int]) -> None:
    path = str(shoot(film, tmp_path / f"film.{film.ending}", [Fraction(k, 25) for k in range(4)], aspect=aspect))
    frames = list(decode_video(path))
    assert [frame.shape for frame in frames] == [(*shape, 3)] * 4
    width = shape[1] // 8  # the eight bars of the picture stay equally wide
    bars = [frames[3][-8:, k * shape[1] // 8 + width // 4 : (k + 1) * shape[1] // 8 - width // 4] for k in range(8)]
    assert [bar.mean() > 125 for bar in bars] == [True, True] + [False] * 6


def test_pixels_of_no_real_shape(tmp_path: Path) -> None:
    path = shoot(Film("mp4", "libx264"), tmp_path / "film.mp4", aspect=Fraction(30, 1))
    with pytest.raises(Reject, match="30:1") as caught:
        next(decode_video(str(path)))
    assert caught.value.reason is Reason.UNREADABLE


# ---------------------------------------------------------------------------------------------------- fields


def moving(number: float) -> np.ndarray:
    """A bright bar that moves 8 pixels a frame over a still pattern of lines."""
    drawn = np.full((96, 128, 3), 40, np.uint8)
    drawn[64:, :, :] = np.where(np.arange(32) // 4 % 2, 200, 60)[:, None, None]
    left = round(8 * number) + 8
    drawn[:64, left : left + 16] = 220
    return drawn


def woven(number: int) -> np.ndarray:
    """Odd lines of one moment, even lines of the next half frame: the encoder marks such frames bottom field first."""
    drawn = moving(number)
    drawn[::2] = moving(number + 0.5)[::2]
    return drawn


def combing(picture: np.ndarray) -> float:
    """Mean difference of neighbouring lines, as against lines two apart, where the bar is."""
    lines = picture[8:56].astype(float).mean(2)
    return float(np.abs(np.diff(lines, axis=0)).mean() - np.abs(lines[2:] - lines[:-2]).mean() / 2)


INTERLACED = {"x264-params": "interlaced=1:log-level=none", "crf": "1"}


@pytest.mark.parametrize("turn", [0, 90])
def test_fields_are_made_whole(tmp_path: Path, turn: int) -> None:
    path = encode(tmp_path / "film.mp4", map(woven, range(10)), INTERLACED, turn)
    frames = [np.rot90(frame, -1 if turn else 0) for frame in decode_video(str(path))]
    assert len(frames) == count_frames(str(path)) == 10
    assert combing(woven(5)) > 5
    for number, frame in enumerate(frames[1:-1], 1):
        assert combing(frame) < 0.5
        assert np.abs(frame[:64].astype(int) - moving(number)[:64]).mean() < 3  # the moment of the first field
        still = np.abs(frame[66:94].astype(int) - moving(number)[66:94])
        assert still.max() < 16  # lines that do not move keep their sharpness


def test_whole_frames_are_left_alone(tmp_path: Path) -> None:
    path = encode(tmp_path / "film.mp4", map(woven, range(4)), {"x264-params": "log-level=none", "crf": "1"})
    assert combing(next(decode_video(str(path)))) > 5


def test_a_cut_of_interlaced_material_equals_the_whole(tmp_path: Path) -> None:
    path = str(encode(tmp_path / "film.mp4", map(woven, [k % 10 for k in range(150)]), INTERLACED))
    whole = list(decode_video(path))
    np.testing.assert_array_equal(list(decode_video(path, 3.2, 4.0)), whole[80:100])


# --------------------------------------------------------------------------------------------------- upright


@pytest.mark.parametrize("quarter", [0, 1, 2, 3])
@pytest.mark.parametrize("mirrored", [False, True])
def test_every_turn_and_mirror(quarter: int, mirrored: bool) -> None:
    """Against the matrix applied to each pixel's place: x' = a x + c y, y' = b x + d y."""
    turn = np.array([[1, 0], [0, 1]])
    for _ in range(quarter):
        turn = turn @ np.array([[0, 1], [-1, 0]])
    if mirrored:
        turn = np.array([[-1, 0], [0, 1]]) @ turn
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    matrix = np.zeros((3, 3), np.int32)
    matrix[:2, :2], matrix[2, 2] = turn * 65536, 1 << 30
    places = np.stack(np.meshgrid(np.arange(7), np.arange(5)), -1).reshape(-1, 2)
    moved = places @ turn
    moved -= moved.min(0)
    wanted = np.zeros((*(moved.max(0) + 1)[::-1], 3), np.uint8)
    wanted[moved[:, 1], moved[:, 0]] = picture[places[:, 1], places[:, 0]]
    np.testing.assert_array_equal(upright(picture, matrix.ravel(), "film"), wanted)


def test_a_slanted_matrix_is_refused() -> None:
    matrix = np.array([[46341, 46341, 0], [-46341, 46341, 0], [0, 0, 1 << 30]], np.int32)
    with pytest.raises(Reject, match="no quarter turn"):
        upright(np.zeros((4, 4, 3), np.uint8), matrix.ravel(), "film")


def test_turned_film_with_oblong_pixels(tmp_path: Path) -> None:
    """The width is scaled before the turn: pixels are oblong as they are stored."""
    path = shoot(Film("mkv", "libx264"), tmp_path / "film.mkv", aspect=Fraction(2, 1))
    frames = list(decode_video(str(path)))
    assert frames[0].shape == (48, 128, 3)
    assert indices(frames) == list(range(FRAMES))

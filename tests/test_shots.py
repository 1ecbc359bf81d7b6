"""Shot changes: hard cuts are found to the frame, and motion, flashes and fades are not taken for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest

from pipeline.media import decode_video
from pipeline.shots import ShotFinder
from pipeline.stages.faces import FacesConfig

REAL = {
    "01_grid_bbaf2n_25fps.mpg": [],
    "02_grid_brbk7n_23976.mp4": [],
    "08_two_faces_grid_sbia1a_L_swiz3n_R.mp4": [],
    "10_face_scenery_face_two_speakers_cut.mp4": [75, 138],
    "13_grid_swiz3n_vfr.mp4": [],
    "14_pexels_silent_track_23976.mp4": [],
    "15_grid_lbax4n_audio_late_240ms.mp4": [],
}
"""First frames of shots at 25 Hz; the cuts of clip 10 lie at 3.0 s and 5.5 s."""


def cuts(frames: Iterable[np.ndarray]) -> list[int]:
    finder = ShotFinder(FacesConfig().cut)
    for frame in frames:
        finder.add(frame)
    return finder.finish()


def scene(seed: int, width: int = 640) -> np.ndarray:
    """A wide picture with soft patches of colour, uint8 [180, width, 3]."""
    small = np.random.default_rng(seed).integers(0, 255, (6, width // 32, 3), np.uint8)
    return cv2.resize(small, (width, 180), interpolation=cv2.INTER_CUBIC)


def pan(seed: int, count: int, step: int) -> list[np.ndarray]:
    wide = scene(seed, 320 + step * count)
    return [wide[:, number * step : number * step + 320] for number in range(count)]


def shake(seed: int, count: int) -> list[np.ndarray]:
    """One place, seen by an unsteady hand."""
    wide, moves = scene(seed), np.random.default_rng(seed).integers(0, 6, count)
    return [wide[:, move : move + 320] for move in moves]


@pytest.mark.parametrize("name", REAL)
def test_real_clips(clips: Path, name: str) -> None:
    assert cuts(decode_video(str(clips / name))) == REAL[name]


def test_cuts_between_speakers_of_one_studio(clips: Path) -> None:
    """The same blue wall behind all of them."""
    names = ["01_grid_bbaf2n_25fps.mpg", "02_grid_brbk7n_23976.mp4", "13_grid_swiz3n_vfr.mp4"]
    takes = [list(decode_video(str(clips / name)))[:40] for name in names]
    assert cuts(frame for take in takes for frame in take) == [40, 80]


@pytest.mark.parametrize("length", [1, 2, 12, 30])
def test_a_cut_is_found_at_any_place(length: int) -> None:
    assert cuts([*shake(1, length), *shake(2, 30)]) == [length]
    assert cuts([*shake(1, 30), *shake(2, length)]) == [30]


def test_short_shots_between_others() -> None:
    assert cuts([*shake(1, 20), *shake(2, 3), *shake(3, 20)]) == [20, 23]


@pytest.mark.parametrize("step", [2, 8, 16])
def test_motion_is_no_cut_and_hides_none(step: int) -> None:
    assert cuts(pan(1, 40, step)) == []
    assert cuts([*pan(1, 30, step), *pan(2, 30, step)]) == [30]


@pytest.mark.parametrize("length", [1, 2, 5])
def test_flashes_and_dropouts_are_no_cuts(length: int) -> None:
    for colour in (0, 255):
        frames = shake(1, 50)
        for number in range(20, 20 + length):
            frames[number] = np.full_like(frames[number], colour)
        assert cuts(frames) == []


def test_fades_give_no_cut() -> None:
    def mix(share: float) -> np.ndarray:
        return cv2.addWeighted(scene(1)[:, :320], 1 - share, scene(2)[:, :320], share, 0)

    fade: Sequence[np.ndarray] = [mix(share) for share in np.linspace(0, 1, 15)]
    assert cuts([*shake(1, 20), *fade, *shake(2, 20)]) == []


def test_repeated_frames_hide_nothing() -> None:
    """12.5 pictures a second on a grid of 25: every other difference is none."""
    frames = [frame for frame in [*pan(1, 25, 16), *pan(2, 25, 16)] for _ in range(2)]
    assert cuts(frames) == [50]
    assert cuts([]) == []

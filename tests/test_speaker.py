"""Which face speaks: two people side by side with the sound of either, and what must never win."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from itertools import permutations
from pathlib import Path

import av
import numpy as np
import pytest

from pipeline.frames import Frames
from pipeline.media import decode_audio, decode_video
from pipeline.speaker import choose_speaker, correlations, follows, mouth_motion, spectral_flux
from pipeline.stage import Clip, Item, Reason, Reject
from pipeline.stages.faces import Faces, FacesConfig
from shards.schema import FIELDS, check_value

LENGTH = 73
SENTENCES = {"01": (0.0, 0.0), "02": (0.0, 0.0), "13": (0.0, 0.0), "15": (0.0, 0.24), "08": (3.0, 0.0)}
"""Five speakers, a sentence each: seconds of the film that are used (0: all), seconds by which its sound is late."""


def item(path: Path, start: float | None = None, end: float | None = None) -> Item:
    return Item(Clip(path.stem, str(path), "", start=start, end=end))


@pytest.fixture(scope="module")
def stage() -> Faces:
    made = Faces(FacesConfig())
    made.setup()
    return made


@pytest.fixture(scope="module")
def quick() -> Faces:
    made = Faces(FacesConfig(every=3))
    made.setup()
    return made


@pytest.fixture(scope="module")
def people(clips: Path, quick: Faces) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Mouth motion and change of the sound of each sentence."""
    found = {}
    for name, (length, late) in SENTENCES.items():
        path = next(clips.glob(f"{name}_*"))
        motion = mouth_motion(quick.run(item(path, 0.0, length or None))["face"])
        found[name] = motion[:LENGTH], spectral_flux(decode_audio(str(path), late, length or None), LENGTH)
    return found


def test_the_speaker_is_found_among_all_pairs(people: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Both move their mouths. GRID's sentences begin and end alike; a rival who speaks at another time is easier."""
    same: Counter[bool | None] = Counter()
    other: Counter[bool | None] = Counter()
    for one, two in permutations(people, 2):
        (motion, flux), (rival, _) = people[one], people[two]
        choice = choose_speaker([rival, motion], flux, 0.3, 0.15)
        same[choice.best == 1 if choice.decided else None] += 1
        for shift in (12, 25, 37, 50):
            choice = choose_speaker([motion, np.roll(rival, shift)], flux, 0.3, 0.15)
            other[choice.best == 0 if choice.decided else None] += 1
    assert same[False] == other[False] == 0
    assert same[True] >= 9
    assert other[True] >= 70


def test_a_still_face_never_wins(people: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    random = np.random.default_rng(0)
    for motion, flux in people.values():
        noise = np.abs(random.normal(0, 0.05, LENGTH))
        faint = 0.05 * flux / flux.max()  # follows the sound, by less than the noise of a codec
        for still in (np.zeros(LENGTH), noise, faint):
            assert choose_speaker([still, motion], flux, 0.3, 0.15).best == 1
            unrelated = np.roll(motion[::-1], 20)
            choice = choose_speaker([still, unrelated], flux, 0.3, 0.15)
            assert not (choice.decided and choice.best == 0)


def test_faces_that_take_turns_are_not_decided(people: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    (one, first), (two, second) = people["13"], people["02"]
    still = np.zeros(LENGTH)
    flux = np.concatenate([first, second])
    motions = [np.concatenate([one, still]), np.concatenate([still, two])]
    assert not choose_speaker(motions, flux, 0.3, 0.15).decided
    assert choose_speaker([np.concatenate([one, two]), np.zeros(2 * LENGTH)], flux, 0.3, 0.15).decided


@pytest.mark.parametrize("rest", range(25))
def test_a_turn_at_the_end_is_seen(rest: int) -> None:
    """Whatever the length: no frame is in none of the parts."""
    random = np.random.default_rng(3)
    flux = 10 * np.convolve(random.normal(size=200), np.ones(5) / 5, "valid")[: 150 + rest]
    turn = np.arange(len(flux)) >= len(flux) - 50
    choice = choose_speaker([np.where(turn, 0, flux), np.where(turn, flux, 0)], flux, 0.3, 0.15)
    assert (choice.best, choice.decided) == (0, False)


def test_clip_of_two_faces_by_its_parts(clips: Path, stage: Faces) -> None:
    path = next(clips.glob("08_*"))
    for start, end, side in ((0.0, 3.0, 0), (3.0, 6.0, 1)):
        fields = stage.run(item(path, start, end))
        record = fields["track"]
        assert (record["by"], record["candidates"], record["chosen"]) == ("speaks", 2, side)
        assert record["margin"] > 0.4
        middle = fields["boxes"][:, [0, 2]].mean()
        assert (middle > 360) == bool(side)
        np.testing.assert_allclose(record["box"], fields["boxes"].mean(axis=0), atol=1)
        check_value(FIELDS["track"], record, 75)
    with pytest.raises(Reject, match="left to right") as refused:
        stage.run(item(path))
    assert refused.value.reason is Reason.SEVERAL_FACES


def write_pair(path: Path, left: Path, right: Path, sound: Path | None, delay: int) -> None:
    """Two clips side by side, 360x288 each, the right one begun `delay` frames into its sentence (and round)."""
    pictures = [list(decode_video(str(source)))[:LENGTH] for source in (left, right)]
    pictures[1] = pictures[1][delay:] + pictures[1][:delay]
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=25, options={"qscale": "3"})
        video.width, video.height, video.pix_fmt = 720, 288, "yuv420p"
        audio = container.add_stream("aac", rate=16_000, layout="mono") if sound else None
        for pair in zip(*pictures, strict=True):
            frame = av.VideoFrame.from_ndarray(np.concatenate(pair, axis=1), format="rgb24")
            container.mux(video.encode(frame))
        container.mux(video.encode())
        if sound and audio:
            samples = decode_audio(str(sound))[None, : 640 * LENGTH]
            block = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), format="fltp", layout="mono")
            block.sample_rate, block.pts, block.time_base = 16_000, 0, Fraction(1, 16_000)
            container.mux(audio.encode(block))
            container.mux(audio.encode())


@pytest.mark.parametrize("sound", ["01", "13", None])
def test_two_films_side_by_side(sound: str | None, clips: Path, quick: Faces, tmp_path: Path) -> None:
    one, two = (next(clips.glob(f"{name}_*")) for name in ("01", "13"))
    left, right = (one, two) if sound == "01" else (two, one)
    write_pair(tmp_path / "pair.mp4", left, right, left if sound else None, delay=25)
    if sound is None:
        with pytest.raises(Reject, match="no sound") as refused:
            quick.run(item(tmp_path / "pair.mp4"))
        assert refused.value.reason is Reason.SEVERAL_FACES
        return
    fields = quick.run(item(tmp_path / "pair.mp4"))
    assert (fields["track"]["by"], fields["track"]["chosen"]) == ("speaks", 0)
    assert (fields["boxes"][:, 2] < 360).all()


def test_motion_is_the_mouths_own(clips: Path, quick: Faces) -> None:
    """A face that only moves about or gets brighter has a mouth at rest."""
    face = quick.run(item(next(clips.glob("13_*"))))["face"]
    speaking = mouth_motion(face)
    assert speaking[0] == 0
    moved = np.stack([np.roll(face[0], (t % 3, t % 2), axis=(0, 1)) for t in range(20)])
    brighter = np.stack([np.clip(face[0] * (1 + 0.01 * t), 0, 255).astype(np.uint8) for t in range(20)])
    for crops in (moved, brighter, face[:1].repeat(20, axis=0)):
        assert mouth_motion(crops).mean() < 0.4 * speaking.mean()


def test_flux_is_the_change_of_the_bands() -> None:
    time = np.arange(32_000) / 16_000
    steady = np.sin(2 * np.pi * 500 * time)
    switched = steady * (time % 0.8 < 0.4)
    assert spectral_flux(steady, 50)[4:-4].max() < 0.01
    flux = spectral_flux(switched, 50)
    # It changes where the tone is switched: every 10 frames.
    assert {place for place in range(2, 48) if flux[place] > 0.5 * flux[2:48].max()} <= {
        near + 10 * number for number in range(6) for near in (-2, -1, 0, 1)
    }
    assert not spectral_flux(np.zeros(0), 50).any()
    np.testing.assert_allclose(spectral_flux(switched * 0.01, 50), flux, atol=1e-6)  # the level does not matter


def test_correlation_is_pearsons_where_both_move() -> None:
    random = np.random.default_rng(1)
    wave = 100 * np.convolve(random.normal(size=120), np.ones(9) / 9, "valid")
    motion, flux = wave[5:105], wave[2:102]  # the sound shows three frames later what the mouth did
    found = correlations(motion, flux, 5)
    assert found.argmax() == 5 + 3
    assert found.max() > 0.99
    assert follows(motion, flux) == found.max()
    assert not correlations(np.zeros(100), flux, 5).any()
    assert not correlations(motion[:7], flux[:7], 5).any()  # too short to tell


def test_frames_are_decoded_again_only_where_they_do_not_fit() -> None:
    made = [np.full((2, 2, 3), number, np.uint8) for number in range(5)]
    shown = [made[0], made[0], *made[1:]]
    calls = []

    def decode() -> object:
        calls.append(1)
        return iter(shown)

    kept = Frames(decode, limit=60)  # type: ignore[arg-type]
    assert [list(map(id, kept)) for _ in range(3)] == [list(map(id, shown))] * 3
    assert len(calls) == 1
    large = Frames(decode, limit=59)  # type: ignore[arg-type]
    assert [list(map(id, large)) for _ in range(2)] == [list(map(id, shown))] * 2
    assert len(calls) == 3

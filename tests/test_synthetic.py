"""The synthetic corpus: repeatable, in step, and a face that detectors and landmark finders read as intended."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("espeakng_loader", reason="needs the demo extra")
pytest.importorskip("skimage", reason="needs the demo extra")
av = pytest.importorskip("av")

from cli.main import main  # noqa: E402
from pipeline.synthetic.corpus import SPEAKERS, Take, make_take, plan, write_corpus, write_faulty  # noqa: E402
from pipeline.synthetic.espeak import speak  # noqa: E402
from pipeline.synthetic.face import render  # noqa: E402
from pipeline.synthetic.visemes import GAP, mouth_track  # noqa: E402
from shards.errors import UserError  # noqa: E402


def decode(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with av.open(str(path)) as container:
        frames = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
    with av.open(str(path)) as container:
        return frames, np.concatenate([f.to_ndarray()[0] for f in container.decode(audio=0)])


def take(speaker: int, words: str) -> Take:
    return Take("train", SPEAKERS[speaker], tuple(words.split()), (5, speaker))


class Landmarks:
    """dlib's 68 points in the largest frontal face, in pixels of the frame."""

    def __init__(self) -> None:
        import dlib

        spec = importlib.util.find_spec("face_recognition_models")
        assert spec is not None
        assert spec.submodule_search_locations
        models = Path(next(iter(spec.submodule_search_locations))) / "models"
        self.rectangle, self.faces = dlib.rectangle, dlib.get_frontal_face_detector()
        self.predict = dlib.shape_predictor(str(models / "shape_predictor_68_face_landmarks.dat"))

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        found = max(self.faces(frames[0], 1), key=lambda r: r.area())
        shapes = [self.predict(np.ascontiguousarray(frame), found) for frame in frames]
        return np.asarray([[(p.x, p.y) for p in shape.parts()] for shape in shapes], float)


def lip_gap(points: np.ndarray) -> np.ndarray:
    """Mean distance of the inner lips over the distance of the outer eye corners."""
    gap = np.linalg.norm(points[:, 61:64] - points[:, [67, 66, 65]], axis=-1).mean(-1)
    return gap / np.linalg.norm(points[:, 36] - points[:, 45], axis=-1)


@pytest.fixture(scope="module")
def landmarks() -> Landmarks:
    pytest.importorskip("dlib")
    return Landmarks()


def test_same_seed_same_clips_whatever_the_workers(tmp_path: Path) -> None:
    one = write_corpus(tmp_path / "a", clips=4, voices=2, seed=3)
    two = write_corpus(tmp_path / "b", clips=4, voices=2, seed=3, workers=2)
    assert [p.relative_to(tmp_path / "a") for p in one] == [p.relative_to(tmp_path / "b") for p in two]
    for a, b in zip(one, two, strict=True):
        assert a.with_suffix(".txt").read_text() == b.with_suffix(".txt").read_text()
        for x, y in zip(decode(a), decode(b), strict=True):
            np.testing.assert_array_equal(x, y)
    other = write_corpus(tmp_path / "c", clips=4, voices=2, seed=4)
    assert {p.name for p in other} != {p.name for p in one}


def test_sound_and_picture_are_equally_long(tmp_path: Path) -> None:
    for path in write_corpus(tmp_path, clips=3, voices=3, seed=1):
        frames, samples = decode(path)
        assert 1.7 <= len(frames) / 25 <= 3.0
        # AAC comes in blocks of 1024 samples; nothing of the sentence is cut.
        assert 0 <= len(samples) - 640 * len(frames) < 1024
        loud = np.flatnonzero(np.abs(samples) > 0.02)
        assert loud[0] > 0.2 * 16000
        assert loud[-1] < 640 * len(frames) - 0.2 * 16000


def test_splits_share_no_sentence() -> None:
    takes = plan(200, 4, seed=0)
    by_split = {s: {t.text for t in takes if t.split == s} for s in ("train", "valid", "test")}
    assert [len(by_split[s]) for s in ("train", "valid", "test")] == [160, 20, 20]
    assert not by_split["train"] & by_split["test"]
    assert not by_split["train"] & by_split["valid"]
    assert not by_split["valid"] & by_split["test"]
    assert len({(t.speaker.name, t.split) for t in takes}) == 12
    assert len({(t.speaker.name, t.name) for t in takes}) == 200
    with pytest.raises(UserError, match="voices"):
        plan(10, 9, 0)


def test_held_out_voices_speak_in_test_alone() -> None:
    takes = plan(640, 4, seed=1, held_out_voices=1)
    assert len({t.text for t in takes}) == len(takes) == 640
    counts = Counter((t.split, t.speaker.name) for t in takes)
    known = ("s1", "s2", "s3", "s4")
    assert {key for key in counts if key[1] not in known} == {("test", "s5")}
    assert counts["test", "s5"] == 40
    assert [sum(counts[split, s] for s in known) for split in ("train", "valid", "test")] == [480, 60, 60]
    assert min(counts.values()) >= 15
    assert plan(9, 1, 0, held_out_voices=2)[-1].speaker.name == "s3"
    for clips, held in ((10, 5), (4, 2), (10, -1)):
        with pytest.raises(UserError, match=r"held-out voices|clips asked for"):
            plan(clips, 4, 0, held_out_voices=held)


def test_command_writes_the_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--clips", "4", "--voices", "1", "--held-out-voices", "1", "--seed", "2", "--size", "128"]
    assert main(["corpus", str(tmp_path / "c"), *options]) == 0
    assert "4 clips" in capsys.readouterr().out
    found = sorted(p.relative_to(tmp_path / "c").parent.as_posix() for p in tmp_path.rglob("*.mp4"))
    assert found == ["test/s1", "test/s2", "train/s1", "valid/s1"]
    assert main(["corpus", str(tmp_path / "d"), "--voices", "8", "--held-out-voices", "1"]) == 2
    assert "held-out" in capsys.readouterr().err


@pytest.mark.parametrize("speaker", SPEAKERS, ids=lambda s: s.voice)
def test_phoneme_times_cover_the_sound(speaker) -> None:
    speech = speak("place red with M seven please", speaker.voice, rate=speaker.rate)
    times = [t for t, _ in speech.phonemes]
    assert times == sorted(times)
    loud = np.flatnonzero(np.abs(speech.samples) > 0.02) / 16000
    assert times[0] <= loud[0] + 0.02
    end = next(t for t, s in reversed(speech.phonemes) if s != "_")
    assert end < loud[-1] <= times[-1] + 0.15
    symbols = [s for _, s in speech.phonemes]
    assert symbols[0] == "p"
    assert "m" in symbols


def test_voices_differ_and_an_unknown_one_is_refused() -> None:
    sounds = {speak("bin blue", s.voice).samples.tobytes() for s in SPEAKERS}
    assert len(sounds) == len(SPEAKERS)
    assert speak("bin", "en-us+m3", seed=1).samples.tobytes() == speak("bin", "en-us+m3", seed=1).samples.tobytes()
    for voice in ("en-us+nobody", "xx"):
        with pytest.raises(UserError, match="no v"):
            speak("bin", voice)


@pytest.mark.parametrize("symbol", ["b", "p", "m"])
def test_lips_close_for_labials_between_vowels(symbol: str, landmarks: Landmarks) -> None:
    track = mouth_track([(0.0, "A@"), (0.3, symbol), (0.38, "A@"), (0.7, "_")], 30, 0.25)
    closed = int(np.argmin(track[8:22, GAP])) + 8
    assert track[closed, GAP] < 0.05
    assert abs((closed + 0.5) / 25 - (0.25 + 0.34)) < 0.06
    assert track[10:13, GAP].max() > 0.8
    frames = render(track, SPEAKERS[0].look, np.random.default_rng(0), 192)
    gaps = lip_gap(landmarks(frames))
    assert gaps[closed] < 0.4 * gaps[8:22].max()


@pytest.mark.parametrize("speaker", [0, 3])
def test_landmarks_follow_the_commanded_mouth(speaker: int, landmarks: Landmarks) -> None:
    frames, _, mouths = make_take(take(speaker, "place white by M five again"))
    assert np.corrcoef(lip_gap(landmarks(frames)), mouths[:, GAP])[0, 1] > 0.9


def test_mouth_and_sound_are_in_step() -> None:
    """The best shift between opening and loudness, over several sentences, is less than a frame."""
    scores = np.zeros(9)
    for speaker, words in enumerate(["bin blue at A two now", "lay red by Q four again", "set green in I nine please"]):
        _, samples, mouths = make_take(take(speaker, words), size=128)
        loud = np.sqrt((samples.reshape(-1, 640) ** 2).mean(-1))
        for i, shift in enumerate(range(-4, 5)):
            scores[i] += np.corrcoef(np.roll(mouths[:, GAP], shift), loud)[0, 1]
    assert abs(int(np.argmax(scores)) - 4) <= 1


@pytest.mark.parametrize("speaker", range(len(SPEAKERS)))
def test_face_is_found_in_every_frame(speaker: int) -> None:
    retinaface = pytest.importorskip("retinaface")
    frames, _, _ = make_take(take(speaker, "place white by O three soon"))
    for frame in frames[::4]:
        faces = retinaface.detect_faces(frame)
        assert len(faces) == 1
        assert faces[0].score > 0.9


def test_faulty_clips_are_what_their_names_say(tmp_path: Path) -> None:
    paths = {p.stem: p for p in write_faulty(tmp_path)}
    assert set(paths) == {"no_face", "no_audio", "truncated", "silent", "too_short", "playlist"}
    with av.open(str(paths["no_audio"])) as container:
        assert not container.streams.audio
    frames, samples = decode(paths["silent"])
    assert np.abs(samples).max() < 1e-4
    assert len(decode(paths["too_short"])[0]) == 5
    assert paths["playlist"].read_bytes().startswith(b"#EXTM3U")
    texture, _ = decode(paths["no_face"])
    assert np.abs(np.diff(texture.astype(float), axis=0)).mean() > 1
    try:
        usable = len(decode(paths["truncated"])[0])
    except av.FFmpegError:
        usable = 0
    assert usable < len(frames)

"""Detector, tracks, landmarks, lips, identity and expression, on drawn faces and on real clips."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import align
from pipeline.media import decode_video
from pipeline.networks.retinaface import Faces as Detections
from pipeline.networks.retinaface import RetinaFace, anchor_boxes, decode_boxes, suppress
from pipeline.stage import Clip, Fields, Item, Reason, Reject, Rejection, Stage
from pipeline.stages.expression import Expression, ExpressionConfig
from pipeline.stages.faces import Faces, FacesConfig
from pipeline.stages.identity import Identity, IdentityConfig
from pipeline.stages.landmarks import Landmarks, LandmarksConfig
from pipeline.stages.lips import Lips, LipsConfig
from pipeline.tracks import join_tracks


def run(stage: Stage, path: Path, fields: Fields) -> Fields:  # type: ignore[type-arg]
    stage.setup()
    return stage.run(Item(Clip(path.stem, str(path), ""), fields))


@pytest.fixture(scope="module")
def visual(clips: Path) -> dict[str, Fields]:
    """All visual fields of three real clips: two sentences of one speaker (3, 15) and another speaker (1)."""
    found = {}
    for name in ("01", "03", "15"):
        path = next(clips.glob(f"{name}_*"))
        fields = run(Faces(FacesConfig()), path, {})
        fields |= run(Landmarks(LandmarksConfig()), path, fields)
        fields |= run(Lips(LipsConfig()), path, fields)
        fields |= run(Identity(IdentityConfig()), path, fields)
        fields |= run(Expression(ExpressionConfig()), path, fields)
        found[name] = fields
    return found


def test_detector_agrees_with_the_package_it_comes_in(clips: Path) -> None:
    from retinaface import detect_faces

    frames = [frame for frame, _ in zip(decode_video(str(next(clips.glob("08_*")))), range(20), strict=False)][::5]
    ours = RetinaFace(0.9, 0.4, 4096).detect(frames)
    for frame, mine in zip(frames, ours, strict=True):
        theirs = sorted(detect_faces(frame), key=lambda face: face.x)
        order = np.argsort(mine.boxes[:, 0])
        assert len(theirs) == len(order) == 2
        for face, number in zip(theirs, order, strict=True):
            x0, y0, x1, y1 = mine.boxes[number]
            np.testing.assert_allclose([face.x, face.y, face.width, face.height], [x0, y0, x1 - x0, y1 - y0], atol=2)
            points = [(point.x, point.y) for point in face.landmarks]
            np.testing.assert_allclose(points, mine.points[number], atol=2)
            assert abs(face.score - mine.scores[number]) < 1e-3


def test_frames_in_a_batch_and_scaled_frames_give_the_same_faces(clips: Path) -> None:
    frames = [frame for frame, _ in zip(decode_video(str(next(clips.glob("01_*")))), range(6), strict=False)]
    detector = RetinaFace(0.8, 0.4, 640)
    together = detector.detect(frames)
    for frame, faces in zip(frames, together, strict=True):
        alone = detector.detect([frame])[0]
        np.testing.assert_allclose(alone.boxes, faces.boxes, atol=1e-2)
    doubled = detector.detect([cv2.resize(frames[0], None, fx=3, fy=3)])[0]  # above the limit: scaled down again
    np.testing.assert_allclose(doubled.boxes / 3, together[0].boxes, atol=8)


def test_anchors_and_decoding_follow_the_paper() -> None:
    anchors = anchor_boxes(70, 40)
    counts = [9 * 5 * 2, 5 * 3 * 2, 3 * 2 * 2]  # ceil of the sides over strides 8, 16, 32; two sizes each
    assert len(anchors) == sum(counts)
    np.testing.assert_array_equal(anchors[[0, 1, 2]], [(4, 4, 16, 16), (4, 4, 32, 32), (12, 4, 16, 16)])
    np.testing.assert_array_equal(anchors[counts[0]], (8, 8, 64, 64))
    # Centre moves by 0.1 x offset x side, the side grows by exp(0.2 x offset).
    box = decode_boxes(np.array([[1.0, -2.0, 0.5, 0.0]]), np.array([[50.0, 50.0, 16.0, 32.0]]))[0]
    width = 16 * np.exp(0.1)
    np.testing.assert_allclose(box, [51.6 - width / 2, 43.6 - 16, 51.6 + width / 2, 43.6 + 16])


@given(st.integers(0, 30), st.integers(0, 99))
def test_suppression_keeps_what_no_better_box_covers(count: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    corners = random.uniform(0, 50, (count, 2))
    boxes = np.concatenate([corners, corners + random.uniform(5, 30, (count, 2))], axis=1)
    kept: list[int] = []
    for number, (ax0, ay0, ax1, ay1) in enumerate(boxes):
        covered = False
        for bx0, by0, bx1, by1 in boxes[kept]:
            common = max(0, min(ax1, bx1) - max(ax0, bx0)) * max(0, min(ay1, by1) - max(ay0, by0))
            total = (ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - common
            covered |= common / total > 0.4
        if not covered:
            kept.append(number)
    assert suppress(boxes, 0.4).tolist() == kept


def detections(*boxes: tuple[float, float, float]) -> Detections:
    """Square faces given as (x, y, side)."""
    corners = np.array([(x, y, x + side, y + side) for x, y, side in boxes], np.float32).reshape(-1, 4)
    return Detections(corners, np.ones(len(boxes), np.float32), np.zeros((len(boxes), 5, 2), np.float32))


def test_tracks_follow_faces_and_survive_short_absences() -> None:
    frames = [detections((10 + t, 10, 40), (200 - t, 10, 30)) for t in range(30)]
    frames[10:15] = [detections((200 - t, 10, 30)) for t in range(10, 15)]
    tracks = join_tracks(frames, 0.3, 12)
    assert sorted(len(track.boxes) for track in tracks) == [25, 30]
    assert [float(track.boxes[29][0]) for track in tracks] == [39, 171]
    assert len(join_tracks(frames, 0.3, 3)) == 3  # five frames away is too long now
    cut = [detections((10, 10, 40))] * 10 + [detections((100, 100, 40))] * 10
    assert [len(track.boxes) for track in join_tracks(cut, 0.3, 12)] == [10, 10]
    same_place = [detections((10, 10, 40))] * 20
    assert [list(track.boxes) for track in join_tracks(same_place, 0.3, 12, cuts=[7, 15])] == [
        [*range(7)],
        [*range(7, 15)],
        [*range(15, 20)],
    ]
    looked = [0, 5, 10, 15, 19]
    assert [list(track.boxes) for track in join_tracks(same_place[:5], 0.3, 4, looked)] == [looked]
    assert len(join_tracks(same_place[:5], 0.3, 3, looked)) == 4


class Scripted:
    """A detector that says what the test tells it."""

    batch, on_gpu = 8, False

    def __init__(self, frames: list[Detections]) -> None:
        self._frames = iter(frames)

    def detect(self, batch: list[np.ndarray]) -> list[Detections]:
        return [next(self._frames) for _ in batch]


NONE = detections()
ONE = detections((10, 10, 40))


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ([NONE] * 40, Reason.NO_FACE),
        ([ONE] * 11, Reason.TOO_SHORT),
        ([ONE] * 20 + [NONE] * 13 + [ONE] * 67, Reason.FACE_LOST),
        ([ONE] * 87 + [NONE] * 13, Reason.FACE_LOST),
        ([detections((10, 10, 40), (150, 10, 36))] * 40, Reason.SEVERAL_FACES),
        ([ONE] * 20 + [detections((150, 10, 40))] * 20, Reason.FACE_LOST),
        ([ONE] * 101, Reason.TOO_LONG),
    ],
)
def test_clips_that_cannot_be_used(script: list[Detections], reason: Reason, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = np.zeros((60, 200, 3), np.uint8)
    monkeypatch.setattr("pipeline.media.decode_video", lambda *_: iter([frame] * len(script)))
    monkeypatch.setattr("pipeline.media.decode_audio", lambda *_: np.zeros(0, np.float32))
    stage = Faces(FacesConfig(max_seconds=4))
    stage._detector = Scripted(script)  # type: ignore[assignment]
    with pytest.raises(Reject) as refused:
        stage.run(Item(Clip("k", "k.mp4", "")))
    assert refused.value.reason is reason
    assert "k.mp4" in str(refused.value)


def test_gaps_are_filled_and_small_faces_behind_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = np.zeros((60, 200, 3), np.uint8)
    moving = [detections((10 + t, 10, 40), (150, 10, 20)) for t in range(30)]
    moving[10:20] = [NONE] * 10
    monkeypatch.setattr("pipeline.media.decode_video", lambda *_: iter([frame] * 30))
    monkeypatch.setattr("pipeline.align.similarity", lambda *_: np.eye(2, 3))
    stage = Faces(FacesConfig(min_coverage=0.5))
    stage._detector = Scripted(moving)  # type: ignore[assignment]
    fields = stage.run(Item(Clip("k", "k.mp4", "")))
    np.testing.assert_allclose(fields["boxes"][:, 0], 10 + np.arange(30), atol=1e-4)
    assert fields["face"].shape == (30, 112, 112, 3)
    assert fields["track"]["by"] == "largest"


def test_skipped_frames_are_bridged(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = np.zeros((60, 200, 3), np.uint8)
    monkeypatch.setattr("pipeline.media.decode_video", lambda *_: iter([frame] * 28))
    monkeypatch.setattr("pipeline.align.similarity", lambda *_: np.eye(2, 3))
    stage = Faces(FacesConfig(every=5))
    stage._detector = Scripted([detections((10 + t, 10, 40)) for t in (0, 5, 10, 15, 20, 25, 27)])  # type: ignore[assignment]
    fields = stage.run(Item(Clip("k", "k.mp4", "")))
    np.testing.assert_allclose(fields["boxes"][:, 0], 10 + np.arange(28), atol=1e-4)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_for_a_gpu_frames_are_decoded_on_a_thread_of_their_own(monkeypatch: pytest.MonkeyPatch, on_gpu: bool) -> None:
    """The same frames in the network's batches, by another thread; none is left when a clip is refused."""
    threads, sizes = set(), []

    def decode(*_: object) -> Iterator[np.ndarray]:
        for number in range(30):
            threads.add(threading.current_thread().name)
            yield np.full((60, 200, 3), number, np.uint8)

    def points(frames: Sequence[np.ndarray], boxes: np.ndarray, five: np.ndarray) -> np.ndarray:
        sizes.append(len(frames))
        assert [frame[0, 0, 0] for frame in frames] == boxes[:, 0].tolist() == five[:, 0, 0].tolist()
        return np.tile(boxes[:, :1, None], (1, 68, 2))

    monkeypatch.setattr("pipeline.media.decode_video", decode)
    monkeypatch.setattr("pipeline.align.similarity", lambda *_: np.eye(2, 3))
    marks = Landmarks(LandmarksConfig())
    marks._batch, marks._on_gpu, marks._points = 12, on_gpu, points
    count = np.arange(30, dtype=np.float32)
    tracks = {"boxes": np.tile(count[:, None], (1, 4)), "points5": np.tile(count[:, None, None], (1, 5, 2))}
    found = marks.run(Item(Clip("k", "k.mp4", ""), tracks))["landmarks"]
    assert sizes == [12, 12, 6]
    assert found[:, 0, 0].tolist() == count.tolist()
    assert ("prefetch" in threads) == on_gpu
    assert ("MainThread" in threads) != on_gpu

    threads.clear()
    for limit, refused in ((4, False), (1, True)):
        stage = Faces(FacesConfig(max_seconds=limit))
        detector = Scripted([ONE] * 30)
        detector.on_gpu = on_gpu
        stage._detector = detector  # type: ignore[assignment]
        assert isinstance(stage.attempt(Item(Clip("k", "k.mp4", ""))), Rejection) == refused
    assert threads == {"prefetch" if on_gpu else "MainThread"}
    assert not any(thread.name == "prefetch" for thread in threading.enumerate())


def test_a_face_after_a_cut_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    shots = [np.full((60, 200, 3), level, np.uint8) for level in (40, 200)]
    monkeypatch.setattr("pipeline.media.decode_video", lambda *_: iter([shots[0]] * 30 + [shots[1]] * 30))
    stage = Faces(FacesConfig())
    stage._detector = Scripted([ONE] * 60)  # type: ignore[assignment]
    with pytest.raises(Reject, match=r"shot changes at 1\.20 s") as refused:
        stage.run(Item(Clip("k", "k.mp4", "")))
    assert refused.value.reason is Reason.FACE_LOST


def test_faces_are_upright_and_centred(visual: dict[str, Fields]) -> None:
    for name, fields in visual.items():
        left_eye, right_eye, nose, left_mouth, right_mouth = fields["points5"].transpose(1, 0, 2)
        assert (left_eye[:, 0] < right_eye[:, 0]).all(), name
        assert (left_mouth[:, 0] < right_mouth[:, 0]).all(), name
        assert (left_eye[:, 1] < nose[:, 1]).all(), name
        assert (nose[:, 1] < left_mouth[:, 1]).all(), name
        found = RetinaFace(0.8, 0.4, 640).detect(
            [cv2.copyMakeBorder(fields["face"][9], *[56] * 4, cv2.BORDER_REPLICATE)]
        )
        np.testing.assert_allclose(found[0].points[0] - 56, align.ARCFACE, atol=6)


def test_landmarks_agree_with_the_detectors_points(visual: dict[str, Fields]) -> None:
    for fields in visual.values():
        points, five = fields["landmarks"], fields["points5"]
        eyes = np.linalg.norm(five[:, 0] - five[:, 1], axis=1)
        for number, chosen in enumerate((slice(36, 42), slice(42, 48), [30], [48], [54])):
            distance = np.linalg.norm(points[:, chosen].mean(axis=1) - five[:, number], axis=1) / eyes
            assert np.median(distance) < 0.15


def test_lips_stay_in_place_while_they_speak(visual: dict[str, Fields]) -> None:
    """The mouth's darkest and most moving part is in the middle of the crop, not at its edges."""
    for name, fields in visual.items():
        motion = np.abs(np.diff(fields["lips"].astype(float), axis=0)).mean(axis=0)
        middle = motion[36:68, 24:72].mean()
        edges = np.concatenate([motion[:12].ravel(), motion[:, :8].ravel(), motion[:, -8:].ravel()]).mean()
        assert middle > 1.5 * edges, name


def test_identity_knows_its_speaker(visual: dict[str, Fields]) -> None:
    mean = {name: fields["identity"].astype(float).mean(axis=0) for name, fields in visual.items()}
    for name, vector in mean.items():
        np.testing.assert_allclose(np.linalg.norm(visual[name]["identity"].astype(float), axis=1), 1, atol=1e-2)
        mean[name] = vector / np.linalg.norm(vector)
    # dlib's own threshold for one person is a distance of 0.6 between embeddings.
    assert np.linalg.norm(mean["03"] - mean["15"]) < 0.35
    assert np.linalg.norm(mean["03"] - mean["01"]) > 0.45


def _drawn(transform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A frame of 400x400 with a cross at the mouth, and its 68 landmarks, under a similarity."""
    template = np.zeros((68, 2))
    template[list(align.STABLE)] = align.CANONICAL
    template[48:68] = align.CANONICAL[6:].mean(axis=0) + np.random.default_rng(0).normal(0, 6, (20, 2))
    template[[48, 54]] = align.CANONICAL[6:]
    centre = template[48:68].mean(axis=0)
    picture = np.full((256, 256, 3), 60, np.uint8)
    x, y = centre.round().astype(int)
    cv2.rectangle(picture, (x - 20, y - 3), (x + 20, y + 3), (200, 30, 30), -1)
    cv2.rectangle(picture, (x - 3, y - 12), (x + 3, y + 12), (30, 200, 30), -1)
    return cv2.warpAffine(picture, transform, (400, 400)), align.transform(transform, template)


def _crop(frame: np.ndarray, points: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    monkeypatch.setattr("pipeline.media.decode_video", lambda *_: iter([frame] * 3))
    item = Item(Clip("k", "k.mp4", ""), {"landmarks": np.stack([points] * 3).astype(np.float32)})
    return Lips(LipsConfig()).run(item)["lips"][1]


def test_lip_crops_do_not_depend_on_size_place_and_tilt(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = _crop(*_drawn(np.eye(2, 3)), monkeypatch)
    assert plain.shape == (96, 96)
    bright = np.argwhere(plain > 80)
    np.testing.assert_allclose(bright.mean(axis=0), 47.5, atol=1.5)
    c, s = 1.3 * np.cos(0.3), 1.3 * np.sin(0.3)
    moved = _crop(*_drawn(np.array([[c, -s, 90], [s, c, -10]])), monkeypatch)
    assert np.abs(moved.astype(float) - plain).mean() < 3


def test_a_mouth_far_from_its_place_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    frame, points = _drawn(np.eye(2, 3))
    points[48:68] += (0, 45)
    points[[48, 54]] -= (0, 45)
    with pytest.raises(Reject) as refused:
        _crop(frame, points, monkeypatch)
    assert refused.value.reason is Reason.LIPS_OUTSIDE


def test_expression_follows_the_face_and_not_the_head() -> None:
    random = np.random.default_rng(1)
    _, points = _drawn(np.eye(2, 3))
    points[17:48] += random.normal(0, 1, (31, 2))
    stage = Expression(ExpressionConfig())

    def feature(landmarks: np.ndarray) -> np.ndarray:
        return stage.run(Item(Clip("k", "", ""), {"landmarks": landmarks[None].astype(np.float32)}))["expression"][0]

    c, s = 2.2 * np.cos(-0.5), 2.2 * np.sin(-0.5)
    head_moved = align.transform(np.array([[c, -s, 77], [s, c, 5]]), points)
    np.testing.assert_allclose(feature(head_moved), feature(points), atol=2e-3)
    raised = points.copy()
    raised[17:27] -= (0, 7.4)  # brows up by a tenth of the distance of the outer eye corners
    np.testing.assert_allclose((feature(raised) - feature(points))[1:20:2], -0.1, atol=4e-3)

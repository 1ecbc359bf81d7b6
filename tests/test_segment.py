"""Recordings cut into clips: every segment is one shot with the same faces, nothing is lost, nothing is done twice."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext

import pipeline.build
from cli.main import main
from pipeline.build import Summary, build
from pipeline.config import BuildConfig
from pipeline.media import decode_video
from pipeline.mux import write_video
from pipeline.networks.anchors import Faces as Detections
from pipeline.recordings import (
    Cut,
    Refusal,
    Scan,
    cut_recordings,
    make_faces,
    recording_of,
    scan_recipe,
    scan_recording,
    task_of,
)
from pipeline.segment import Rules, Segment, SegmentConfig, Stay, find_segments, seconds, spans_of
from pipeline.sources import safe_key
from pipeline.stage import Clip, Reason
from shards.dataset import ClipRow, Dataset
from shards.errors import UserError
from shards.history import find_garbage
from shards.verify import verify
from tests.conftest import small_build

EVERY = 5
Pictures = list[np.ndarray]


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, int(seconds * 16_000)).astype(np.float32)


def detector(places: Callable[[int], Sequence[tuple[int, int]]]) -> Callable[[Sequence[np.ndarray]], list[Detections]]:
    """Faces by number of the frame looked at: left edge and side of each."""
    count = 0

    def detect(frames: Sequence[np.ndarray]) -> list[Detections]:
        nonlocal count
        found = []
        for _ in frames:
            boxes = np.array([(x, 10, x + side, 10 + side) for x, side in places(count)], np.float32).reshape(-1, 4)
            found.append(Detections(boxes, np.ones(len(boxes), np.float32), np.zeros((len(boxes), 5, 2), np.float32)))
            count += EVERY
        return found

    return detect


def rules(**settings: object) -> Rules:
    return Rules(SegmentConfig.model_validate({"every": EVERY, **settings}), cut=0.15, track_overlap=0.3, max_gap=12)


def grey(path: Path, length: float, sound: np.ndarray | None) -> Clip:
    """A recording in which the detector alone sees something."""
    write_video(path, [np.full((32, 32, 3), 90, np.uint8)] * int(length * 25), sound)
    return Clip("long", str(path), "d" * 64)


stays = st.lists(
    st.tuples(st.lists(st.integers(0, 60), min_size=1, unique=True), st.sampled_from([50.0, 80.0, 200.0])), max_size=4
)


@given(stays)
def test_spans_have_the_same_faces_all_the_time(drawn: list[tuple[list[int], float]]) -> None:
    config = SegmentConfig(min_seconds=0.4, max_seconds=5)
    faces = [Stay(np.array(sorted(frames)), size) for frames, size in drawn]
    lasting = [face for face in faces if face.end - face.begin >= 10]

    def counted(frame: int) -> list[int]:
        there = [face for face in lasting if face.begin <= frame < face.end]
        return [id(face) for face in there if 2 * face.size >= max(face.size for face in there)]

    spans = spans_of(faces, config)
    for one, other in pairwise(spans):
        assert one.end <= other.begin
    for span in spans:
        assert span.end - span.begin >= 10
        (there,) = {tuple(counted(frame)) for frame in range(span.begin, span.end)}
        members = [face for face in lasting if id(face) in there]
        assert len(members) == span.faces > 0
        if len(members) == 1:
            assert {span.begin, span.end - 1} <= set(members[0].frames)
    if len(faces) == 1 and lasting:
        assert [(span.begin, span.end) for span in spans] == [(faces[0].begin, faces[0].end)]


def test_faces_that_come_and_go(tmp_path: Path) -> None:
    def places(frame: int) -> list[tuple[int, int]]:
        left = [(0, 100)] if 10 <= frame < 200 and not 50 <= frame < 55 else []
        right = [(300, 90)] if 100 <= frame < 150 else []
        passer = [(600, 200)] if 20 <= frame < 30 else []
        crowd = [(900, 30)] if frame >= 60 else []
        return [*left, *right, *passer, *crowd]

    found = find_segments(grey(tmp_path / "x.mp4", 10, None), rules(), detector(places), 8)
    assert [(segment.start, segment.end, segment.faces) for segment in found.segments] == [
        (0.4, 3.84, 1),  # the gap is bridged, the passer-by was too short, the crowd is too small
        (4.0, 5.84, 2),
        (6.0, 7.84, 1),
        (8.0, 9.84, 1),
    ]
    parts = sorted((part.start, part.end) for half in (found.segments, found.left_out) for part in half)
    assert [end for _, end in parts] == [*(start for start, _ in parts[1:]), 10.0]
    assert found.refused is None


def test_long_stays_are_cut_where_it_is_quiet(tmp_path: Path) -> None:
    sound = noise(14)
    for begin in (4.4, 9.2):
        sound[int(begin * 16_000) : int((begin + 0.4) * 16_000)] = 0
    always = [(0, 100)]
    found = find_segments(
        grey(tmp_path / "x.mp4", 14, sound), rules(max_seconds=6), detector(lambda frame: always), 3
    ).segments
    assert [segment.start for segment in found[1:]] == [segment.end for segment in found[:-1]]
    assert found[0].end == pytest.approx(4.6, abs=0.13)
    assert found[1].end == pytest.approx(9.4, abs=0.13)
    assert (found[0].start, found[-1].end) == (0, 13.84)
    silent = find_segments(grey(tmp_path / "y.mp4", 14, None), rules(max_seconds=6), detector(lambda frame: always), 3)
    assert [segment.end - segment.start for segment in silent.segments] == pytest.approx([4.64, 4.6, 4.6])


@pytest.mark.parametrize("rate", [Fraction(24_000, 1001), Fraction(30_000, 1001)], ids=str)
def test_frames_of_a_segment_are_those_of_the_whole(tmp_path: Path, rate: Fraction) -> None:
    """In a container that rounds times to milliseconds, where a hair's breadth decides which frame is on display."""
    path = tmp_path / "x.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"g": "30"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(170):
            picture = np.full((48, 64, 3), 40, np.uint8)
            picture[:, : number * 7 % 64] = 200
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    recording = Clip("x", str(path), "")
    whole = list(decode_video(str(path)))
    for begin in range(1, len(whole) - 7, 3):
        part = list(decode_video(str(path), seconds(recording, begin), seconds(recording, begin + 7)))
        np.testing.assert_array_equal(part, whole[begin : begin + 7])


def test_what_breaks_off_or_fails(clips: Path, tmp_path: Path) -> None:
    always = [(0, 100)]
    cut = Clip("cut", str(clips / "12_truncated_faststart_60pct.mp4"), "d" * 64)
    found = find_segments(cut, rules(), detector(lambda frame: always), 8)
    assert found.refused
    assert found.refused.reason is Reason.TRUNCATED
    assert [segment.start for segment in found.segments] == [0]
    assert found.segments[0].end < 1.6
    # A fault is said and not stored.
    dataset, config = Dataset(str(tmp_path / "ds")), BuildConfig()
    task = task_of(cut, scan_recipe(make_faces(config), config))

    def fail(frames: Sequence[np.ndarray]) -> list[Detections]:
        raise ZeroDivisionError("no detector today")

    scan = scan_recording(dataset, task, cut, config, fail, 8)
    assert scan.refused
    assert scan.refused.reason is Reason.FAULT
    assert "no detector today" in scan.refused.traceback
    assert list(dataset.store.list()) == []


@pytest.fixture(scope="module")
def recordings(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two speakers with a landscape between them; two side by side of whom one leaves; a landscape; a damaged file."""
    folder = tmp_path_factory.mktemp("recordings")
    takes = sorted(corpus.glob("*/s?/*.mp4"))
    by_speaker = {path.parent.name: list(decode_video(str(path)))[:40] for path in takes}
    one, two = (by_speaker[name] for name in sorted(by_speaker))
    land = np.random.default_rng(0).integers(0, 255, (12, 12, 3), np.uint8).repeat(16, 0).repeat(16, 1)
    (folder / "anna").mkdir()
    write(folder / "anna/talk.mp4", [*one, *[land] * 30, *two])
    shot = land.copy()
    beside = [np.hstack([left, right]) for left, right in zip(one, two, strict=True)]
    write(folder / "pair.mp4", [*beside, *(np.hstack([left, shot]) for left in one)])
    write(folder / "land.mp4", [land] * 40)
    (folder / "torn.mp4").write_bytes((folder / "anna/talk.mp4").read_bytes()[:4000])
    return folder


def write(path: Path, frames: Pictures) -> None:
    write_video(path, frames, noise(len(frames) / 25))
    path.with_suffix(".txt").write_text("all that is said")


def segmented(**settings: object) -> BuildConfig:
    return small_build(segment={"enabled": True, **settings})


@pytest.fixture(scope="module")
def cut(recordings: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Summary]:
    """The recordings as a dataset, after a build that was stopped when it had looked through them."""
    dataset = Dataset(str(tmp_path_factory.mktemp("cut")))

    def stop(there: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.build, "commit_clips", stop)
        with pytest.raises(KeyboardInterrupt):
            build(str(recordings), dataset.uri, segmented())
    scans = {found.name: found.stamp for found in dataset.store.list("segments/")}
    assert len(scans) == 4
    assert not dataset.exists()
    summary = build(str(recordings), dataset.uri, segmented())
    assert {found.name: found.stamp for found in dataset.store.list("segments/")} == scans
    return dataset, summary


def test_recordings_become_clips(recordings: Path, cut: tuple[Dataset, Summary]) -> None:
    dataset, summary = cut
    assert summary.scanned == 0
    rows = {row.key: row for row in dataset.clips()}
    assert set(rows) == {"anna/talk+000", "anna/talk+001", "land", "pair+000", "pair+001", "torn"}
    assert {(row.speaker, row.text) for row in rows.values() if row.key.startswith("anna")} == {("anna", "")}
    bounds = {key: (row.start, row.end) for key, row in rows.items() if row.start is not None}
    assert bounds == {
        "anna/talk+000": (0.0, 1.44),
        "anna/talk+001": (2.8, 4.24),
        "pair+000": (0.0, 1.44),
        "pair+001": (1.6, 3.04),
    }
    reasons = {row.key: (row.stage, row.reason) for row in dataset.quarantine()}
    assert reasons["land"] == ("faces", "no_face")
    assert reasons["torn"] == ("faces", "truncated")
    assert {key for key, row in rows.items() if row.state == "packed"} == set(rows) - set(reasons)
    assert {"anna/talk+000", "anna/talk+001", "pair+001"} <= set(rows) - set(reasons)
    assert rows["anna/talk+001"].frames == 36
    messages = {row.key: row.message for row in dataset.quarantine()}
    assert str(recordings / "land.mp4") in messages["land"]
    assert verify(dataset.uri).problems == []
    assert not [found for found in find_garbage(dataset, timedelta(0)).old if found.name.startswith("segments/")]


def test_a_second_build_looks_at_nothing(
    recordings: Path, cut: tuple[Dataset, Summary], capsys: pytest.CaptureFixture[str]
) -> None:
    dataset, _ = cut
    before = {found.name: found.stamp for found in dataset.store.list()}
    assert main(["build", dataset.uri]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert {found.name: found.stamp for found in dataset.store.list()} == before


def test_status_says_what_is_in_no_clip(cut: tuple[Dataset, Summary], capsys: pytest.CaptureFixture[str]) -> None:
    dataset, _ = cut
    assert main(["status", dataset.uri]) == 0
    out = capsys.readouterr().out
    assert "cut into segments" in out
    assert "of 9.2 s in 4 recordings, left out:" in out
    assert main(["status", dataset.uri, "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    # A landscape alone, and one between two faces; and frames beside a face that nobody looked at.
    assert tree["left_out"] == {"no_face": 1.6 + 1.36, "too_short": 0.48}
    assert tree["recorded"] == 9.2


def test_a_plan_says_what_comes_first(
    recordings: Path, tmp_path: Path, cut: tuple[Dataset, Summary], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(recordings), str(tmp_path / "new"), "--segment"]) == 0
    out = capsys.readouterr().out
    assert "4 recordings to look through" in out
    assert "fresh" not in out  # no table of nothing
    assert main(["plan", cut[0].uri, "--set", "segment.min_seconds=2", "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert (tree["scan"], tree["gone"], len(tree["unsure"])) == (4, [], 6)
    assert main(["plan", cut[0].uri, "--set", "segment.min_seconds=2"]) == 0
    assert "6 clips of the dataset, e.g. anna/talk+000, from recordings that are looked through anew" in (
        capsys.readouterr().out
    )
    assert main(["plan", cut[0].uri, "--set", "segment.enabled=false"]) == 1
    assert "their recordings are not cut any more, but were (--segment)" in capsys.readouterr().out


def test_other_settings_other_clips_and_none_is_dropped_unasked(
    recordings: Path, tmp_path: Path, cut: tuple[Dataset, Summary]
) -> None:
    dataset, _ = cut
    half = tmp_path / "half"
    shutil.copytree(recordings, half)
    (half / "pair.mp4").unlink()
    wanted = segmented(min_seconds=2)
    some = r"cut otherwise now, without \d clips of the dataset, e\.g\. anna/talk\+000; go back to the settings"
    with pytest.raises(UserError, match=f"{some}.*--drop-missing"):
        build(None, dataset.uri, wanted)
    # What was found meanwhile is kept for the build that may drop them.
    assert len(list(dataset.store.list("segments/"))) == 8
    with pytest.raises(
        UserError, match=f"does not have, or cannot read, 2 clips .*pair.*, and its recordings are {some}"
    ):
        build(str(half), dataset.uri, wanted)


def test_copies_are_looked_through_once() -> None:
    recipe = scan_recipe(make_faces(BuildConfig()), BuildConfig())
    one = task_of(Clip("a", "/one.mp4", "d" * 64), recipe)
    assert task_of(Clip("b", "/two.mp4", "d" * 64), recipe) == one
    assert task_of(Clip("b", "/two.mp4", "d" * 64, start=1.0), recipe).shard != one.shard


def scan(clip: Clip, segments: Sequence[tuple[float, float]], refused: Refusal | None = None) -> dict[str, Scan]:
    task = task_of(clip, scan_recipe(make_faces(BuildConfig()), BuildConfig()))
    parts = [Segment(start=start, end=end, faces=1) for start, end in segments]
    return {task.shard: Scan(task=task, frames=250, cuts=[], segments=parts, left_out=[], refused=refused)}


def test_no_key_of_a_source_is_that_of_a_segment(tmp_path: Path) -> None:
    names = ["a", "a-000", safe_key("a+000"), safe_key("a 000")]
    recordings = [Clip(name, f"/{name}.mp4", str(number) * 64) for number, name in enumerate(names)]
    scans = {key: value for clip in recordings for key, value in scan(clip, [(0, 2), (3, 5)]).items()}
    found = cut_recordings(Dataset(str(tmp_path)), recordings, BuildConfig(), {}, scans, [])
    assert len({clip.key for clip in found.clips}) == 8
    assert {recording_of(clip.key) for clip in found.clips} == set(names)
    # WebDataset reads them as one key with a field's ending.
    assert {base_plus_ext(f"{clip.key}.mel.npy") for clip in found.clips} == {
        (clip.key, "mel.npy") for clip in found.clips
    }


def test_a_fault_leaves_a_recording_as_it_was(tmp_path: Path) -> None:
    clip = Clip("a", "/a.mp4", "d" * 64, "train", "anna")
    fault = scan(clip, [], Refusal(reason=Reason.FAULT, message="out of memory"))
    facts: dict[str, Any] = {
        "uri": "/a.mp4",
        "bytes": 1,
        "stamp": "",
        "digest": "d" * 64,
        "split": "train",
        "speaker": "anna",
    }
    facts |= {"text": "", "frames": 0, "shard": "train-000000", "state": "packed"}
    rows = [ClipRow(key=f"a+00{number}", start=number, end=number + 0.8, **facts) for number in range(2)]

    def clips(clip: Clip, rows: list[ClipRow]) -> Cut:
        return cut_recordings(Dataset(str(tmp_path)), [clip], BuildConfig(), {}, fault, rows)

    kept = clips(clip, rows)
    assert [(part.key, part.start, part.end, part.refused) for part in kept.clips] == [
        ("a+000", 0, 0.8, None),
        ("a+001", 1, 1.8, None),
    ]
    assert any("1 recording could not be looked through" in note for note in kept.notes)
    # Cuts of other media say nothing, and without any it is the recording that failed.
    for known in ([], [replace(row, digest="e" * 64) for row in rows]):
        (whole,) = clips(clip, known).clips
        assert whole.key == "a"
        assert whole.refused
        assert whole.refused.reason is Reason.FAULT

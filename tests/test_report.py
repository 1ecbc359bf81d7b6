"""The report's numbers, what it shows of a dataset, and what becomes of one that is damaged, empty or half built."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import entropy

from cli.main import main
from pipeline.report.figures import Measured, disagreement
from pipeline.report.look import find_worst, spread
from shards.dataset import ClipRow, Dataset, QuarantineRow
from shards.manifest import Manifest
from tests.toy import CLUSTERS, everything, toy_dataset

NASTY = "<img src=x onerror=alert(1)>"


def refuse(dataset: Dataset, rows: list[QuarantineRow], pending: int = 0) -> None:
    """Commit clips in quarantine, and clips of a shard that is not built, beside what the dataset has."""
    manifest, version = dataset.current()
    assert isinstance(manifest, Manifest)
    found = dataset.clips(manifest)
    found += [clip_row(row.key, row.shard, "quarantined", row.split) for row in rows]
    found += [clip_row(f"p{number}", "valid-000000", "pending", "valid") for number in range(pending)]
    packs = dict(manifest.packs)
    for shard in {row.shard for row in rows}:
        reasons = [row.reason for row in rows if row.shard == shard]
        empty: dict[str, Any] = {"inputs": "9" * 16, "record": "", "name": None, "behind": [], "sha256": "", "bytes": 0}
        pack = packs[shard].model_dump() if shard in packs else {**empty, "clips": 0, "frames": 0, "seconds": 0}
        packs[shard] = type(next(iter(manifest.packs.values()))).model_validate(
            {**pack, "refused": {reason: reasons.count(reason) for reason in reasons}}
        )
    changed = manifest.model_copy(
        update={
            "clips": dataset.put_rows(ClipRow, found),
            "quarantine": dataset.put_rows(QuarantineRow, rows),
            "packs": packs,
            "shards": {**manifest.shards, **({"valid-000000": pending} if pending else {})},
        }
    )
    dataset.commit(changed, version)


def clip_row(key: str, shard: str, state: str, split: str = "train") -> ClipRow:
    return ClipRow(key, f"videos/{key}.mp4", 5, "", "", split, "", "", None, None, 0, shard, state)


def refused(key: str, reason: str, message: str, **more: Any) -> QuarantineRow:
    base = QuarantineRow(key, "videos/x.mp4", "train", "train-000000", "faces", reason, message, "", 1, False)
    return replace(base, **more)


def numbers(dataset: Dataset, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["report", dataset.uri, "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def test_numbers_are_those_of_the_clips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = toy_dataset(tmp_path / "ds", [[30, 45], [60]], speakers=["ann", "bob"])
    found, clips = numbers(dataset, capsys), everything(dataset)
    assert (found["clips"], found["sampled"], found["speakers"]) == (3, 3, {"train": 2})
    assert found["status"]["splits"]["train"]["hours"] == pytest.approx(135 / 25 / 3600)

    def agrees(name: str, values: Any) -> None:
        values = np.asarray(values, np.float64)
        one = found["spreads"][name]
        assert one["count"] == len(values) == sum(one["counts"])
        assert one["mean"] == pytest.approx(values.mean())
        for key, share in (("low", 0), ("p5", 5), ("median", 50), ("p95", 95), ("high", 100)):
            assert one[key] == pytest.approx(np.percentile(values, share)), (name, key)

    agrees("seconds", [1.2, 1.8, 2.4])
    agrees("pitch", np.concatenate([one["pitch"][one["pitch"] > 0] for one in clips.values()]))
    agrees("frame_energy", np.concatenate([one["energy"] for one in clips.values()]))
    agrees("voiced", [100 * (one["pitch"] > 0).mean() for one in clips.values()])
    agrees("hertz", [np.nanmedian(one["pitch"]) for one in clips.values()])
    agrees(
        "face", [((b[:, 2] - b[:, 0]) + (b[:, 3] - b[:, 1])).mean() / 2 for b in (c["boxes"] for c in clips.values())]
    )
    agrees("confidence", [0.0, 0.0, 0.0])
    assert "offset" not in found["spreads"]  # the toy has none
    units = np.concatenate([one["units"] for one in clips.values()])
    counts = np.bincount(units, minlength=CLUSTERS)
    assert found["units"]["counts"] == sorted(counts[counts > 0].tolist(), reverse=True)
    assert found["units"]["unused"] == (counts == 0).sum()
    assert found["units"]["perplexity"] == pytest.approx(math.exp(entropy(counts)))
    assert found["units"]["most"] == [int(counts.argmax()), pytest.approx(counts.max() / len(units))]


def test_landmarks_are_held_against_the_detector() -> None:
    random = np.random.default_rng(0)
    landmarks, points = random.random((3, 68, 2)), random.random((3, 5, 2))
    distances = []
    for face, five in zip(landmarks, points, strict=True):
        own = [sum(face[36:42]) / 6, sum(face[42:48]) / 6, face[30], face[48], face[54]]
        distances += [math.dist(a, b) for a, b in zip(own, five, strict=True)]
    eyes = [math.dist(five[0], five[1]) for five in points]
    expected = 100 * (sum(distances) / 15) / (sum(eyes) / 3)
    assert disagreement(landmarks, points) == pytest.approx(expected)
    assert disagreement(landmarks, np.zeros((3, 5, 2))) is None


@given(st.lists(st.integers(1, 1500), min_size=1, max_size=60), st.booleans())
def test_histograms_hold_every_value(frames: list[int], stepped: bool) -> None:
    found = spread(np.array(frames) / 25, 0.04 if stepped else None)
    assert sum(found.counts) == len(frames)
    assert found.edges[0] <= found.low <= found.high <= found.edges[-1] + 1e-9
    assert len(found.edges) == len(found.counts) + 1 <= 34
    if stepped:  # every bin covers as many possible lengths as the others
        assert len({round(b * 25 - a * 25, 6) for a, b in zip(found.edges, found.edges[1:], strict=False)}) == 1
        assert (found.edges[1] - found.edges[0]) * 25 == pytest.approx(round((found.edges[1] - found.edges[0]) * 25))


@given(st.floats(-1e12, 1e12), st.integers(0, 3))
def test_histograms_of_values_that_hardly_differ(low: float, steps: int) -> None:
    high = low
    for _ in range(steps):
        high = math.nextafter(high, math.inf)
    found = spread(np.array([low, high]))
    assert sum(found.counts) == 2
    assert found.edges[0] < found.low <= found.high < found.edges[-1]
    assert all(np.diff(found.edges) > 0)


def test_worst_clips_are_at_the_ends_and_say_why() -> None:
    def one(key: str, **figures: float) -> tuple[str, Measured]:
        return key, Measured(key, figures, {}, np.zeros(0, int))

    measured = dict(
        [
            one("small", face=20, voiced=50, offset=10, confidence=0.9, landmarks=2),
            one("still", face=90, voiced=3, offset=0, confidence=0.8, landmarks=3),
            one("late", face=95, voiced=51, offset=-240, confidence=0.7, landmarks=2),
            one("doubtful", face=96, voiced=52, offset=400, confidence=0.1, landmarks=3),
            one("fine", face=97, voiced=53, offset=0, confidence=0.9, landmarks=1),
            one("shaky", face=98, voiced=54, offset=0, confidence=0.9, landmarks=30),
        ]
    )
    found = find_worst(measured, 5, least=0.5)
    assert set(found) == {"small", "still", "late", "doubtful", "shaky"}
    assert found["small"] == ["smallest face: 20 px"]
    assert found["late"][0] == "sound furthest from the picture: -240 ms"
    assert found["doubtful"][0] == "mouth and sound agree least: 0.1"
    assert "landmarks and detector agree least" in found["shaky"][0]
    assert len(find_worst(measured, 2, 0.5)) == 2
    assert find_worst({}, 4, 0.5) == {}


def test_a_sample_is_bounded_and_drawn_by_its_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = toy_dataset(tmp_path / "ds", [[20] * 5, [24] * 4], fields=("pitch", "energy"))
    few = numbers(dataset, capsys, "--sample", "4", "--clips", "2")
    assert (few["clips"], few["sampled"], len(few["chosen"])) == (9, 4, 2)
    assert few["spreads"]["seconds"]["count"] == 9
    assert few["spreads"]["hertz"]["count"] == 4
    assert numbers(dataset, capsys, "--sample", "4", "--clips", "2") == few
    drawn = [numbers(dataset, capsys, "--sample", "4", "--clips", "4", "--seed", seed)["chosen"] for seed in "01"]
    assert set(drawn[0]) != set(drawn[1])


def test_fields_that_were_not_packed_come_from_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = toy_dataset(tmp_path / "ds", [[20, 30]], fields=("wav",))
    found = numbers(dataset, capsys)
    assert found["spreads"]["frame_energy"]["count"] == 100
    assert found["spreads"]["frame_energy"]["mean"] == pytest.approx((sum(range(40)) + sum(range(60))) / 100)
    assert set(found["spreads"]) == {"seconds", "energy", "frame_energy"}
    page = tmp_path / "r.html"
    assert main(["report", dataset.uri, "-o", str(page)]) == 0
    assert page.read_text().count("<article") == 2
    assert "No pictures of it are stored." in page.read_text()


def test_quarantine_is_counted_by_reason_and_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = toy_dataset(tmp_path / "ds", [[20]])
    long = "no face in any of 75 frames " * 40
    rows = [refused("a", "no_face", long), refused("b", "no_face", "x"), refused("c", "no_face", "y")]
    rows.append(refused("<b>d</b>", "fault", NASTY, stage="pitch", traceback="Traceback", retriable=True))
    refuse(dataset, rows, pending=3)
    found = numbers(dataset, capsys)["quarantine"]
    assert [(one["reason"], one["stage"], one["clips"], one["retriable"]) for one in found] == [
        ("no_face", "faces", 3, 0),
        ("fault", "pitch", 1, 1),
    ]
    assert [key for key, _ in found[0]["examples"]] == ["a", "b"]
    page = tmp_path / "r.html"
    assert main(["report", dataset.uri, "-o", str(page)]) == 0
    text = page.read_text()
    assert NASTY not in text
    assert "<b>d" not in text
    assert "&lt;img src=x onerror=alert(1)&gt;" in text
    assert long not in text
    assert long[:200] in text
    assert "3 clips in shards that are not built yet" in text


def test_nothing_packed_makes_a_page_all_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = toy_dataset(tmp_path / "ds", [[20]])
    manifest, version = dataset.current()
    assert manifest is not None
    index = dataset.index(manifest).model_copy(update={"shards": []})
    rows = [refused("s0c0", "silent", "nothing to hear", stage="audio")]
    gone = {
        "name": None,
        "sha256": "",
        "bytes": 0,
        "clips": 0,
        "frames": 0,
        "refused": {"silent": 1},
    }
    changed = manifest.model_copy(
        update={
            "index": dataset.put_index(index),
            "clips": dataset.put_rows(ClipRow, [clip_row("s0c0", "train-000000", "quarantined")]),
            "quarantine": dataset.put_rows(QuarantineRow, rows),
            "packs": {"train-000000": manifest.packs["train-000000"].model_copy(update=gone)},
        }
    )
    dataset.commit(changed, version)
    page = tmp_path / "r.html"
    assert main(["report", dataset.uri, "-o", str(page)]) == 0
    assert "No clip is packed." in page.read_text()
    assert "nothing to hear" in page.read_text()
    capsys.readouterr()
    # Its energy was made before the sound was refused; it is still there to be seen.
    assert main(["inspect", dataset.uri, "s0c0"]) == 0
    shown = capsys.readouterr().out
    assert "refused  by audio: silent: nothing to hear" in shown
    assert "column" in shown


def test_damage_costs_the_clips_that_it_hit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = toy_dataset(tmp_path / "ds", [[20, 20, 25], [30], [40]])
    first, second, _ = dataset.index().shards
    (tmp_path / "ds" / second.name).unlink()
    data = bytearray((tmp_path / "ds" / first.name).read_bytes())
    offset, size = first.clips[0].members["pitch"]
    data[offset : offset + size] = bytes(size)
    offset, size = first.clips[1].members["energy"]
    data[offset : offset + size] = data[offset : offset + size].replace(b"<f4", b"<i4")
    (tmp_path / "ds" / first.name).write_bytes(data)
    page = tmp_path / "r.html"
    assert main(["report", dataset.uri, "-o", str(page)]) == 1
    captured = capsys.readouterr()
    assert "2 of 5 packed clips looked at" in captured.out
    assert "pitch: damaged npy" in captured.err
    assert "energy: dtype int32" in captured.err
    assert f"{second.name}: missing" in captured.err
    assert "Traceback" not in captured.err
    assert "3 clips could not be read" in page.read_text()
    assert page.read_text().count("<article") == 2
    for shard in dataset.index().shards:
        (tmp_path / "ds" / shard.name).unlink(missing_ok=True)
    before = page.read_bytes()
    assert main(["report", dataset.uri, "-o", str(page)]) == 2
    assert "missing; run `f2v verify`" in capsys.readouterr().err
    assert page.read_bytes() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ds"], "-o report.html"),
        (["ds", "-o", "r.txt"], "must end in .html"),
        (["ds", "-o", "none/r.html"], "none: no such folder"),
        (["none", "-o", "r.html"], "no dataset here"),
        (["ds", "-o", "r.html", "--split", "dev"], "no split 'dev'; it has train"),
        (["ds", "-o", "r.html", "--clips", "41"], "--clips 41"),
        (["ds", "-o", "r.html", "--sample", "0"], "--sample 0"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    toy_dataset("ds", [[20]], fields=("energy",))
    assert main(["report", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("*.html"))

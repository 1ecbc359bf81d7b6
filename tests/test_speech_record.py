"""Speech of other settings: removed where a clip fails, and no predictions are left beside speech without any."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cli.main import main
from model.speech_record import Task, made_with, remove_stale
from pipeline.mux import write_video
from pipeline.stage import Clip
from tests.speaking import talking, untrained


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained(tmp_path_factory.mktemp("run"))


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_clip_that_fails_on_a_rerun_keeps_no_speech_of_other_settings(run: Path, tmp_path: Path) -> None:
    videos, out = tmp_path / "videos", tmp_path / "out"
    videos.mkdir()
    write_video(videos / "a.mp4", talking(0)[:12], None)
    many = ["synthesize", str(videos), "-o", str(out), "--checkpoint", str(run), "--steps", "1", "--format"]
    assert main([*many, "mp4", "--save", "pitch"]) == 0
    assert left(out) == ["a.json", "a.mp4", "a.npz", "a.wav"]
    # Without predictions now: those of before would pass for these.
    assert main([*many, "mp4"]) == 0
    assert left(out) == ["a.json", "a.mp4", "a.wav"]
    (out / "theirs.wav").write_bytes(b"not ours")
    grey = np.full((12, 64, 64, 3), 128, np.uint8)
    write_video(videos / "a.mp4", grey, None)
    write_video(videos / "theirs.mp4", grey, None)
    assert main([*many, "wav"]) == 1
    assert left(out) == ["failed.csv", "theirs.wav"]


def test_what_was_made_alike_and_sources_stay_where_a_clip_fails(tmp_path: Path) -> None:
    task = Task("a", Clip("a", "a.mkv", ""), tmp_path / "a.wav", {"seed": 1, "save": [], "format": "wav"})
    for ending in (".wav", ".mp4", ".npz"):
        task.output.with_suffix(ending).write_bytes(b"x")
    record = tmp_path / "a.json"
    record.write_text(json.dumps({"made_with": task.facts}))
    remove_stale(task, ())
    assert left(tmp_path) == ["a.json", "a.mp4", "a.npz", "a.wav"]
    # Only what the record speaks of goes.
    record.write_text(json.dumps({"made_with": {"seed": 2, "save": ["mel"], "format": "mp4"}}))
    remove_stale(task, {(tmp_path / "a.mp4").resolve()})
    assert left(tmp_path) == ["a.mp4"]
    assert made_with(task.output) is None

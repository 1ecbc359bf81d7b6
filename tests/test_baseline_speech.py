"""Baselines in synthesis: who is told a voice, and who reads the face over the whole clip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cli.main import main
from model.synthesis import Synthesizer
from model.windows import OVERLAP, WINDOW
from shards.errors import UserError
from tests.small_model import SMALL as TINY
from tests.speaking import features, untrained
from tests.test_baselines import SMALL


@pytest.mark.parametrize("many", [False, True])
def test_a_system_that_must_be_told_a_voice_is_refused_before_any_clip(
    many: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = untrained(tmp_path / "run", system="v2sflow", speaker="voice", **SMALL)
    videos, out = tmp_path / "videos", tmp_path / ("out" if many else "out.wav")
    videos.mkdir()
    (videos / "clip.mp4").write_bytes(b"no video")
    source = videos if many else videos / "clip.mp4"
    assert main(["synthesize", str(source), "-o", str(out), "--checkpoint", str(run)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "takes its speaker from a reference voice (model.speaker=voice)" in error
    assert "f2v evaluate --checkpoint ... --dataset ..." in error
    assert not out.exists()


@pytest.mark.parametrize(
    "changes",
    [{"system": "svts"}, {"system": "intelligible"}, {"encoder": {**TINY["encoder"], "identity": "mean"}}],
)
def test_a_long_clip_has_one_speaker(changes: dict[str, Any], tmp_path: Path) -> None:
    synthesizer = Synthesizer(untrained(tmp_path, **SMALL, **changes), device="cpu")
    frames = 2 * WINDOW - OVERLAP
    clip = {name: value[np.arange(frames) % 20] for name, value in features(20).items()}
    faces = np.random.default_rng(1).normal(size=(2, 128)).astype(np.float32)

    def heard(identity: np.ndarray) -> np.ndarray:
        return synthesizer._predict({**clip, "identity": identity})["mu"].numpy()

    changing = heard(faces.repeat(frames // 2, axis=0))
    mean, first = (heard(np.tile(face, (frames, 1))) for face in (faces.mean(axis=0), faces[0]))
    np.testing.assert_allclose(changing, mean, atol=1e-4)
    assert np.abs(changing - first).max() > 1e-3


def test_a_voice_of_another_width_is_said(tmp_path: Path) -> None:
    told = Synthesizer(untrained(tmp_path / "told", system="svts", speaker="voice", **SMALL), device="cpu")
    for timbre in (np.zeros(7, np.float32), np.zeros((1, 9), np.float32)):
        with pytest.raises(UserError, match=r"timbre: \(.*\), but the checkpoint's network takes \(9,\)"):
            told.speak([{**features(4), "timbre": timbre}])
    (spoken,) = told.speak([{**features(4), "timbre": np.ones(9, np.float32)}])
    assert spoken.mel.shape == (8, 80)
    # Shards of another speech stage hold voices of another width, which who reads the face never looks at.
    seeing = Synthesizer(untrained(tmp_path / "seeing", system="svts", **SMALL), device="cpu")
    assert seeing.speak([{**features(4), "timbre": np.zeros(7, np.float32)}])[0].mel.shape == (8, 80)

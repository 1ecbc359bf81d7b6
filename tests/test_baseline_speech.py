"""Baselines in synthesis: who is told a voice, and who reads the face over the whole clip."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.main import main
from tests.speaking import untrained
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

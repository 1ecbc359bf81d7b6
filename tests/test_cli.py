"""The command line: quick answers, one-line errors, exit statuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.main import COMMANDS, main


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"usage: f2v {command}" in capsys.readouterr().out


def test_unknown_command_and_option(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["bild"], ["build", "a", "b", "--prefile", "x"], ["build", "a", "b", "--profile", "none"]):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2
    assert "offline" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["build", "none", "ds"], "source none: no such file or folder"),
        (["build", ".", "ds", "--set", "pitch.fmaxx=1"], "unknown key 'pitch.fmaxx'"),
        (["build", ".", "ds", "--set", "speech.layer=9"], "speech.layer 9: whisper_tiny has 4 layers"),
        (["build", ".", "ds", "--set", "pack.shard_clips=0"], "pack.shard_clips: must be at least 1 (got 0)"),
        (
            ["plan", "videos"],
            "holds other files (a.mp4 ...); name a new or empty folder for the dataset: f2v build videos",
        ),
        (["build", "videos/a.mp4"], "is a file; name a folder for the dataset: f2v build SOURCE DATASET"),
        (["build", "videos/a.mp4", "ds"], "is one video; name the folder that holds it"),
        (["build", "videos", "--only", "pitch", "ds"], "pitch needs audio: not built here yet"),
        (["plan", "videos", "--from", "energy", "ds"], "(--only audio --only mel --only energy)"),
        (["build", ".", "ds", "--config", "none.yaml"], "none.yaml: cannot be read"),
        (["build", "empty", "ds"], "no clips found"),
        (["build", "s3://bucket/videos", "ds"], "s3://"),
        (["train", "none", "run"], "no dataset here"),
        (["train", "none", "run", "--set", "data.batsh=1"], "unknown key 'data.batsh'"),
        (["synthesize", "a.mp4", "-o", "b.avi", "--checkpoint", "run"], "must end in .mp4 or .wav"),
        (["synthesize", "a.mp4", "-o", "b.mp4", "--checkpoint", "run", "--steps", "0"], "--steps must be 1 or more"),
        (["synthesize", "a.mp4", "-o", "b.mp4", "--checkpoint", "run", "--guidance", "nan"], "--guidance"),
        (["synthesize", "a.mp4", "-o", "b.mp4", "--checkpoint", "run"], "run: no such checkpoint"),
        (["synthesize", "a.mp4", "-o", "b.mp4", "--checkpoint", "empty"], "no checkpoint"),
    ],
)
def test_mistakes_are_one_line(
    argv: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_bytes(b"")
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len([line for line in error.splitlines() if not line.startswith("read source")]) == 1
    assert not (tmp_path / "ds").exists()


def test_a_foreign_folder_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ds").mkdir()
    (tmp_path / "ds" / "thesis.tex").write_text("x")
    (tmp_path / "videos").mkdir()
    assert main(["build", str(tmp_path / "videos"), str(tmp_path / "ds")]) == 2
    assert "thesis.tex" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "ds").iterdir()] == ["thesis.tex"]

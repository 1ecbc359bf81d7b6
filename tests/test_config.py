"""Configuration: layers, types, and one clear line for what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import BuildConfig
from shards.config import load_config
from shards.errors import UserError


def test_file_lies_over_defaults_and_overrides_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "build.yaml"
    file.write_text("pitch: {fmin: 70, fmax: 500}\npack: {shard_clips: 7}\n")
    config = load_config(BuildConfig, file, ["pitch.fmax=450"])
    assert (config.pitch.fmin, config.pitch.fmax, config.pack.shard_clips) == (70, 450, 7)
    assert config.mel.filterbank == "htk"


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("pitch.fmaxx=5", "pitch.fmaxx"),
        ("picth.fmax=5", "picth"),
        ("pitch.fmax=high", "pitch.fmax"),
        ("pack.shard_clips=0", "pack.shard_clips"),
        ("pitch.fmax", "key=value"),
        ("mel.filterbank=bark", "mel.filterbank"),
    ],
)
def test_mistakes_name_the_key(override: str, part: str) -> None:
    with pytest.raises(UserError, match=part):
        load_config(BuildConfig, None, [override])


def test_what_is_wrong_is_said_in_plain_words() -> None:
    said = {}
    for override in ("pitch.fmax=high", "speech.layer=1.5", "segment.enabled=maybe", "mel.filterbank=bark", "pitch=5"):
        with pytest.raises(UserError) as caught:
            load_config(BuildConfig, None, [override])
        said[override] = str(caught.value).removeprefix("config (command line): ")
    assert said == {
        "pitch.fmax=high": "pitch.fmax: expected a number (got 'high')",
        "speech.layer=1.5": "speech.layer: expected a whole number (got 1.5)",
        "segment.enabled=maybe": "segment.enabled: expected true or false (got 'maybe')",
        "mel.filterbank=bark": "mel.filterbank: choose from htk, slaney (got 'bark')",
        "pitch=5": "pitch: expected keys of its own, as in `section: {key: value}` (got 5)",
    }


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n", "pitch: 5\n", "\x00"])
def test_broken_files_are_one_clear_error(tmp_path: Path, text: str) -> None:
    file = tmp_path / "build.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=r"build\.yaml"):
        load_config(BuildConfig, file)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml"):
        load_config(BuildConfig, tmp_path / "none.yaml")


def test_a_profile_lies_below_what_is_given(tmp_path: Path) -> None:
    file = tmp_path / "build.yaml"
    file.write_text("profile: paper\nspeech:\n  clusters: 200\n")
    config = load_config(BuildConfig, file, ["identity.network=iresnet100"])
    assert (config.speech.encoder, config.speech.clusters) == ("hubert_large", 200)
    assert (config.identity.network, config.identity.every) == ("iresnet100", 1)
    assert config.landmarks.network == "fan4"
    # Settings that a dataset stored are whole: they come back as they were.
    assert load_config(BuildConfig, base=config.model_dump(mode="json")) == config
    assert load_config(BuildConfig).speech.encoder == "whisper_tiny"


@pytest.mark.parametrize(
    ("override", "other"),
    [
        ("segment.max_seconds=61", "faces.max_seconds = 60"),
        ("audio.max_seconds=20", "segment.max_seconds = 24"),
        ("segment.min_seconds=0.2", r"faces.min_frames = 12 \(0.48 s\)"),
        ("faces.min_frames=26", "segment.min_seconds = 1 "),
    ],
)
def test_segments_fit_the_stages(override: str, other: str) -> None:
    """Before a recording is looked through, not when its clips are refused one by one."""
    with pytest.raises(UserError, match=other):
        load_config(BuildConfig, None, [override, "segment.enabled=true"])
    load_config(BuildConfig, None, [override])
    load_config(BuildConfig, None, ["segment.enabled=true", "segment.max_seconds=60", "segment.min_seconds=0.48"])


def test_the_folder_of_checkpoints_may_come_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("F2V_WEIGHTS", str(tmp_path))
    assert load_config(BuildConfig).run.weights == tmp_path
    monkeypatch.chdir(tmp_path)
    assert load_config(BuildConfig, None, ["run.weights=nets"]).run.weights == tmp_path / "nets"
    monkeypatch.setenv("F2V_WEIGHTS", "")
    assert load_config(BuildConfig).run.weights is None

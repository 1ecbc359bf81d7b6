"""Evaluation of checkpoints on a dataset's split, and sweeps of them. The networks are stand-ins."""

from __future__ import annotations

import json
import sys
import wave
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cli.main import main
from model import checkpoint
from model.config import ModelConfig
from model.evaluation.config import EvaluationConfig
from model.evaluation.evaluate import Evaluation
from model.evaluation.quoted import LABELS, TABLE_5
from model.evaluation.split_clips import SplitClips
from model.evaluation.spoken import evaluate_checkpoint
from model.evaluation.sweeps import ablation_runs, check_runs, has_run, report, sweep_guidance, train_runs
from model.synthesis import Sampling, Spoken
from model.train_config import dataset_facts
from shards.dataset import Dataset
from shards.errors import UserError
from tests.fake_metrics import FakeMetrics
from tests.toy import toy_dataset, toy_values

FRAMES = (9, 12, 15)
CONFIG = EvaluationConfig()


class FakeSynthesizer:
    """Speaks a tone as long as the clip; every second unit, and nothing but units and energy, is predicted right."""

    def __init__(self, dataset: Path) -> None:
        facts = dataset_facts(Dataset(str(dataset)).index(), "train")
        self.state = SimpleNamespace(step=5, dataset=facts, config={"data": {"pitch": "zero"}})
        self.network = SimpleNamespace(config=SimpleNamespace(system="fake", told_voice=False))
        self.sampling = Sampling()
        self.digests = {"network_sha256": "n"}
        self.spoken = 0

    def facts(self) -> dict[str, Any]:
        return {"system": "fake", "step": 5, "vocoder": "none", **asdict(self.sampling)}

    def speak(self, clips: list[dict[str, Any]]) -> list[Spoken]:
        self.spoken += len(clips)
        return [self._speak(len(clip["lips"])) for clip in clips]

    def _speak(self, frames: int) -> Spoken:
        true = toy_values("", frames)
        units = true["units"].astype(np.int64)
        units[::2] = -1
        wave = np.full(640 * frames, 0.25, np.float32)
        return Spoken(wave, true["mel"] + 0.5, units=units, energy=true["energy"])


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    toy_dataset(tmp_path / "ds", [list(FRAMES[:2]), list(FRAMES[2:])], speakers=("x", "y"))
    return tmp_path / "ds"


def evaluate(synthesizer: FakeSynthesizer, dataset: Path, count: int | None = None) -> Evaluation:
    out, clips = dataset.parent / "out", SplitClips(str(dataset), "train", count)
    return evaluate_checkpoint(
        synthesizer,  # type: ignore[arg-type]
        clips,
        CONFIG,
        out,
        workers=1,
        cache=dataset.parent / "cache",
        make=FakeMetrics,
    )


def test_a_split_is_spoken_once_and_scored(dataset: Path) -> None:
    synthesizer, out = FakeSynthesizer(dataset), dataset.parent / "out"
    found = evaluate(synthesizer, dataset)
    assert [clip.key for clip in found.clips] == ["s0c0", "s0c1", "s1c0"]
    summary = found.summary()
    assert summary["dnsmos_ovrl"].value == pytest.approx(0.25, abs=1e-4)
    assert summary["unit_accuracy"].value == 0.5
    assert summary["mel_l1"].value == pytest.approx(0.5, abs=1e-6)
    assert summary["energy_mae"].value == 0
    assert not {"timbre_mae", "pitch_mae"} & set(summary)
    assert found.facts["made"]["network_sha256"] == "n"
    for folder in ("speech", "reference"):
        with wave.open(str(out / folder / "s0c1.wav")) as file:
            assert file.getnframes() == 640 * FRAMES[1]
            sound = np.frombuffer(file.readframes(10**6), "<i2")
        if folder == "reference":
            np.testing.assert_array_equal(sound, toy_values("s0c1", FRAMES[1])["wav"])

    assert synthesizer.spoken == 3
    again = evaluate(synthesizer, dataset)
    assert synthesizer.spoken == 3
    assert again.clips == found.clips
    # Speech that is not as it was written, or was made in another way, is made again.
    (out / "speech/s0c0.wav").write_bytes(b"cut")
    (out / "made/s0c1.json").write_text("{")
    assert evaluate(synthesizer, dataset).clips == found.clips
    assert synthesizer.spoken == 5
    synthesizer.sampling = Sampling(seed=3)
    # What is left there of another system must not pass for this one's.
    with pytest.warns(UserWarning, match="1 more clips, such as .*, were made in another way"):
        fewer = evaluate(synthesizer, dataset, 2)
    assert [clip.key for clip in fewer.clips] == SplitClips(str(dataset), "train", 2).keys
    assert synthesizer.spoken == 7


def test_a_voice_that_was_told_is_no_prediction(dataset: Path) -> None:
    class Told(FakeSynthesizer):
        def _speak(self, frames: int) -> Spoken:
            return replace(super()._speak(frames), timbre=toy_values("", frames)["timbre"])

    predicted = evaluate(Told(dataset), dataset)
    assert "timbre_mae" in predicted.summary()
    assert predicted.facts["voice"] == "predicted"
    synthesizer = Told(dataset)
    synthesizer.digests = {"network_sha256": "another"}
    synthesizer.network.config.told_voice = True
    with pytest.warns(UserWarning, match="told the voice of its own reference"):
        told = evaluate(synthesizer, dataset)
    assert "timbre_mae" not in told.summary()
    assert told.facts["voice"] == "told, from the reference"


def test_a_dataset_made_in_another_way_is_refused(dataset: Path) -> None:
    synthesizer = FakeSynthesizer(dataset)
    synthesizer.state.dataset["stages"]["lips"] = {"version": 1, "settings": {}, "weights": ""}
    with pytest.raises(UserError, match="other lips"):
        evaluate(synthesizer, dataset)
    synthesizer.state.dataset["profile"] = "paper"
    with pytest.raises(UserError, match="profile paper"):
        evaluate(synthesizer, dataset)
    with pytest.raises(UserError, match="no split 'test'"):
        SplitClips(str(dataset), "test")


def test_guidance_sweep_is_one_table(dataset: Path) -> None:
    synthesizer, out = FakeSynthesizer(dataset), dataset.parent / "sweep"
    clips = SplitClips(str(dataset), "train", 2)
    cache = dataset.parent / "cache"
    found = sweep_guidance(synthesizer, clips, CONFIG, out, (0.0, 0.7), (1, 2), 1, cache, FakeMetrics)  # type: ignore[arg-type]
    names = ["guidance 0, 1 steps", "guidance 0.7, 1 steps", "guidance 0, 2 steps", "guidance 0.7, 2 steps"]
    assert [evaluation.name for evaluation in found] == names
    assert [tuple(evaluation.facts["made"][key] for key in ("guidance", "steps")) for evaluation in found] == [
        (0, 1),
        (0.7, 1),
        (0, 2),
        (0.7, 2),
    ]
    text, tree = report(found, out, TABLE_5, "sampling", names[1])
    rows = [line for line in text.splitlines() if line.startswith("| guidance")]
    assert len(rows) == 4 + 3  # the table, and differences from one of them
    assert all("+0.000 [+0.000, +0.000]" in row for row in rows[4:])
    assert "| *guidance 0.7, LRS3 valid (quoted)* |" in text
    assert text in (out / "table.md").read_text()
    assert json.loads((out / "sweep.json").read_text()) == json.loads(json.dumps(tree))
    assert (out / "evaluated/guidance-0.7-steps-2/clips.csv").is_file()


def run_of(folder: Path, step: int, status: int = 0) -> list[str]:
    """A command that stands for a training."""
    code = (
        f"import pathlib, sys; print('said'); p = pathlib.Path({str(folder)!r}); p.mkdir(exist_ok=True); "
        f"(p / 'step-{step:08d}.pt').touch(); (p / 'count').open('a').write('x'); sys.exit({status})"
    )
    return [sys.executable, "-c", code]


def test_runs_are_trained_until_they_are_finished(tmp_path: Path) -> None:
    commands = {name: run_of(tmp_path / name, 10) for name in ("full", "hier")}
    train_runs(commands, tmp_path, steps=10, minutes=False, parallel=2)
    assert (tmp_path / "hier.log").read_text() == "said\n"
    train_runs(commands, tmp_path, steps=10, minutes=False, parallel=1)
    assert (tmp_path / "full/count").read_text() == "x"
    with pytest.raises(UserError, match="before its last step"):
        train_runs(commands, tmp_path, steps=20, minutes=False, parallel=1)
    # With a time limit a run is over when it ends.
    train_runs(commands, tmp_path, steps=20, minutes=True, parallel=2)
    train_runs(commands, tmp_path, steps=20, minutes=True, parallel=2)
    assert (tmp_path / "hier/count").read_text() == "xx"
    # The mark of that run is not one for more steps.
    with pytest.raises(UserError, match="before its last step"):
        train_runs(commands, tmp_path, steps=30, minutes=False, parallel=1)
    assert (tmp_path / "full/count").read_text() == "xxxx"
    with pytest.raises(UserError, match=r"training ws ended with status 3; see .*ws\.log"):
        train_runs({"ws": run_of(tmp_path / "ws", 1, status=3)}, tmp_path, steps=10, minutes=False, parallel=1)
    assert not has_run(tmp_path, "prosody")


def test_ablations_are_the_papers() -> None:
    assert ablation_runs() == ["full", "hier", "timbre", "prosody", "face_id", "fe", "ws", "mp"] == list(LABELS)
    assert ablation_runs(["ws", "hier"]) == ["full", "hier", "ws"]


def saved(folder: Path, step: int = 10, profile: str = "offline", **switches: bool) -> None:
    """A run's folder with a checkpoint of no tensors."""
    folder.mkdir(parents=True)
    shape = ModelConfig.model_validate(switches).model_dump(mode="json")
    checkpoint.save(folder, checkpoint.Checkpoint(step, {}, shape, {"profile": profile}, {}, {}), keep=1)


def test_runs_are_what_their_folders_are_called(tmp_path: Path) -> None:
    saved(tmp_path / "full")
    saved(tmp_path / "hier", hier=False)
    assert check_runs(tmp_path, ["full", "hier"]) == []
    saved(tmp_path / "ws", step=20, profile="paper", ws=False)
    with pytest.warns(UserWarning, match="differ by more than the part"):
        notes = check_runs(tmp_path, ["full", "hier", "ws"])
    steps = [f"{name}: trained for {count} steps" for name, count in (("full", 10), ("hier", 10), ("ws", 20))]
    assert notes == [*steps, "ws: another dataset than full (profile)"]
    saved(tmp_path / "mp")
    with pytest.raises(UserError, match=r"mp: the network has every part, and 'mp' means mp off"):
        check_runs(tmp_path, ["full", "mp"])
    saved(tmp_path / "fe", fe=False, ws=False)
    with pytest.raises(UserError, match=r"fe: the network has fe, ws off"):
        check_runs(tmp_path, ["full", "fe"])
    saved(tmp_path / "other/full", hier=False)
    with pytest.raises(UserError, match=r"full: the network has hier off"):
        check_runs(tmp_path / "other", ["full"])


def test_table_says_what_else_sets_runs_apart(dataset: Path) -> None:
    found = [evaluate(FakeSynthesizer(dataset), dataset)]
    text, tree = report(found, dataset.parent, TABLE_5, "model", "fake, step 5, none", ["a|b"])
    assert "* a\\|b" in text
    assert tree["notes"] == ["a|b"]


def test_runs_that_are_asked_for_must_be_there(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", "ablations", str(dataset), str(dataset.parent / "runs"), "--split=train", "--no-train"]
    assert main([*command, "--metrics=length"]) == 2
    assert "full: no checkpoint" in capsys.readouterr().err
    (dataset.parent / "runs/full").mkdir(parents=True)
    (dataset.parent / "runs/full/step-00000010.pt").touch()
    assert main([*command, "--metrics=length", "--only=hier"]) == 2
    assert "hier: no checkpoint" in capsys.readouterr().err

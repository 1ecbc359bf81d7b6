"""Validation: what it measures, that it leaves training alone, and what it puts into TensorBoard."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from model import checkpoint
from model.ranks import Ranks
from model.synthesis import load_network
from model.train import train
from model.validate import Validation, picture
from shards.clip_table import load_clips
from shards.errors import UserError
from tests.test_train import config, losses
from tests.toy import toy_dataset

WATCHED = ["validation.every=2", "validation.split=train", "validation.samples=1", "validation.steps=1"]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return toy_dataset(tmp_path_factory.mktemp("toy"), [[30, 14], [22, 17]]).uri


@pytest.fixture(scope="module")
def run(toy: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    train(toy, folder, config("steps=4", *WATCHED))
    return folder


def test_means_are_over_frames_of_all_clips(toy: str, run: Path) -> None:
    network = load_network(checkpoint.load(run))
    table = load_clips(toy, "train", 13, {})
    cpu = torch.device("cpu")

    def measured(frames: int) -> dict[str, float]:
        settings = config("validation.split=train", f"validation.max_frames={frames}")
        return Validation(toy, settings, table.snapshot, Ranks(), "htk").measure(network, cpu)

    together, alone = measured(10_000), measured(1)
    assert network.training
    # The flow's noise depends on the batch, the rest must not.
    chance = {"cfm", "loss"}
    assert together.keys() == alone.keys() >= {"content", "pitch", "free_pitch", "free_mel", "unit_accuracy"}
    for name in together.keys() - chance:
        assert together[name] == pytest.approx(alone[name], rel=1e-4), name
    # Right units, counted by hand over the clips.
    network.eval()
    right = total = 0
    for clip, frames in enumerate(table.frames.tolist()):
        fields = {name: table.read(clip, name) for name in ("lips", "identity", "expression", "units")}
        lips = (fields["lips"][:, 4:92, 4:92].astype(np.float32) / 255 - 0.421) / 0.165
        batch = {
            "lips": torch.from_numpy(lips)[None, None],
            "identity": torch.from_numpy(fields["identity"].astype(np.float32))[None],
            "expression": torch.from_numpy(fields["expression"].astype(np.float32))[None],
            "frames": torch.tensor([frames]),
        }
        with torch.no_grad():
            units = network.encode(batch).logits.argmax(-1)[0].numpy()
        right, total = right + int((units == fields["units"]).sum()), total + len(units)
    assert together["unit_accuracy"] == pytest.approx(right / total, abs=1e-6)


def test_validation_leaves_training_alone(toy: str, run: Path, tmp_path: Path) -> None:
    train(toy, tmp_path, config("steps=4"))
    assert losses(tmp_path) == losses(run)
    one, other = checkpoint.load(tmp_path), checkpoint.load(run)
    assert all(torch.equal(value, other.model[name]) for name, value in one.model.items())


def test_samples_are_to_be_heard_and_seen(toy: str, run: Path) -> None:
    events = EventAccumulator(str(run), size_guidance={"audio": 0, "images": 0})
    events.Reload()
    tags = events.Tags()
    assert "valid/free_pitch" in tags["scalars"]
    assert [event.step for event in events.Scalars("valid/loss")] == [2, 4]
    [key] = {tag.partition("/")[0] for tag in tags["images"]}
    assert [event.step for event in events.Audio(f"{key}/spoken")] == [2, 4]
    assert [event.step for event in events.Audio(f"{key}/true")] == [2]
    table = load_clips(toy, "train", 13, {})
    frames = int(table.frames[table.keys.index(key)])
    sound = events.Audio(f"{key}/spoken")[0]
    assert (sound.sample_rate, sound.length_frames) == (16_000, 640 * frames)
    image = events.Images(f"{key}/mel")[0]
    assert (image.width, image.height) == (3 * 2 * frames, 2 * 3 * 80 + 6)


def test_a_split_without_clips_is_said_once(toy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(toy, tmp_path, config("steps=2", "validation.every=1")).step == 2
    said = capsys.readouterr().err
    assert said.count("no validation: ") == 1
    assert "split 'valid'" in said
    with pytest.raises(UserError, match=r"validation\.split: no split 'dev' in .*; splits are train"):
        train(toy, tmp_path / "other", config("steps=2", "validation.every=1", "validation.split=dev"))


def test_picture_is_bright_where_the_mel_is_loud_and_low_bins_lie_below() -> None:
    mel = np.zeros((5, 80), np.float32)
    mel[:, 0] = 1.0
    image = picture(mel).astype(int).sum(axis=2)
    assert image.shape == (240, 15)
    assert image[-1].min() > image[0].max()

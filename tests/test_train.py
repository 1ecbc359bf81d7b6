"""Training and synthesis: the loss falls, a stopped run goes on as if never stopped, and speech comes out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import wave
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cli.main import main
from model import checkpoint
from model.statistics import mel_statistics
from model.train import train
from model.train_config import TrainConfig, train_config
from pipeline.build import Summary
from shards.clip_table import load_clips
from shards.dataset import Dataset
from shards.errors import UserError
from shards.manifest import Recipe
from shards.reader import read_fields
from shards.storage import open_store
from shards.stream import TrainingStream
from tests.toy import RECIPES, toy_dataset

Built = tuple[Dataset, Summary]
SMALL = [
    "size=tiny",
    "data.batch=2",
    "data.crop_frames=20",
    "data.workers=0",
    "threads=1",
    "log_every=1",
    "checkpoint_every=3",
    "validation.every=0",
    "model.lip_encoder={stem: 4, trunk: [4, 8, 8, 8], dim: 32, layers: 2, heads: 2, ffn: 64, pos_groups: 4}",
    "model.encoder={dim: 32, ffn: 64, heads: 2}",
    "model.decoder={channels: [16, 16], heads: 1, head_dim: 16}",
]


def config(*overrides: str) -> TrainConfig:
    return train_config(None, [*SMALL, *overrides])


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return toy_dataset(tmp_path_factory.mktemp("toy"), [[30, 25], [22]]).uri


def losses(folder: Path) -> dict[int, float]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {event.step: event.value for event in events.Scalars("train/loss")}


def test_a_stopped_run_goes_on_as_if_never_stopped(toy: str, tmp_path: Path) -> None:
    train(toy, tmp_path / "whole", config("steps=6"))
    train(toy, tmp_path / "parts", config("steps=4"))
    result = train(toy, tmp_path / "parts", config("steps=6"))
    assert result.step == 6
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    whole, parts = (checkpoint.load(tmp_path / name) for name in ("whole", "parts"))
    assert all(torch.equal(value, parts.model[name]) for name, value in whole.model.items())


def test_checkpoints_are_pruned_and_load_without_code(toy: str, tmp_path: Path) -> None:
    train(toy, tmp_path, config("steps=9", "keep=2"))
    assert checkpoint.found(tmp_path) == ["step-00000006.pt", "step-00000009.pt"]
    state = torch.load(tmp_path / "step-00000009.pt", weights_only=True)
    assert state["step"] == 9


def test_checkpoints_of_round_steps_stay_if_asked(toy: str, tmp_path: Path) -> None:
    train(toy, tmp_path, config("steps=7", "keep=1", "checkpoint_every=1", "keep_every=3"))
    assert checkpoint.found(tmp_path) == [f"step-{step:08d}.pt" for step in (3, 6, 7)]


def test_a_run_may_begin_with_the_parameters_of_another(toy: str, tmp_path: Path) -> None:
    train(toy, tmp_path / "first", config("steps=2"))
    train(toy, tmp_path / "second", config("steps=1", f"begin={tmp_path / 'first'}", "optimiser.lr=1e-9"))
    first, second = (checkpoint.load(tmp_path / name).model for name in ("first", "second"))
    name = "encoder.to_mel.weight"
    torch.testing.assert_close(first[name], second[name], rtol=0, atol=1e-6)
    assert second["mel_mean"] == first["mel_mean"] != 0
    with pytest.raises(UserError, match="begin was"):
        train(toy, tmp_path / "second", config("steps=2", "begin=another", "optimiser.lr=1e-9"))
    facts = json.loads((tmp_path / "second" / "run.json").read_text())
    assert facts["config"]["begin"] == str(tmp_path / "first")


def test_a_run_in_a_bucket_goes_on(toy: str, s3_uri: str, tmp_path: Path) -> None:
    run = f"{s3_uri}/run"
    train(toy, run, config("steps=2"))
    train(toy, run, config("steps=4"))
    assert checkpoint.found(run) == ["step-00000002.pt", "step-00000003.pt", "step-00000004.pt"]
    store = open_store(run)
    for entry in store.list("events"):
        (tmp_path / entry.name).write_bytes(store.read(entry.name))
    train(toy, tmp_path / "whole", config("steps=4"))
    assert losses(tmp_path) == losses(tmp_path / "whole")


def test_sigterm_leaves_a_checkpoint(toy: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cli.main", "train", toy, str(tmp_path)]
    overrides = [*SMALL, "checkpoint_every=100000", "data.workers=1"]
    command += [part for override in overrides for part in ("--set", override)]
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, start_new_session=True, **pipes)  # type: ignore[call-overload]
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 2 "):
            break
    os.killpg(process.pid, signal.SIGTERM)  # as a batch system does: every process of the job
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "goes on from the last checkpoint" in output
    assert checkpoint.load(tmp_path).step >= 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("optimiser.lr=0.5",), r"optimiser\.lr was 0\.001, is 0\.5"),
        (("model.encoder.dim=64", "ema=0.9"), r"ema was None, is 0\.9, model\.encoder\.dim was 32, is 64;"),
        (("seed=9",), "seed"),
    ],
)
def test_another_configuration_is_refused(toy: str, tmp_path: Path, overrides: tuple[str, ...], message: str) -> None:
    train(toy, tmp_path, config("steps=1"))
    with pytest.raises(UserError, match=message):
        train(toy, tmp_path, config("steps=2", *overrides))


def test_shards_made_in_another_way_are_refused(toy: str, tmp_path: Path) -> None:
    train(toy, tmp_path / "run", config("steps=1"))
    changed = {**RECIPES, "mel": Recipe(version=1, settings={"filterbank": "slaney"}, weights="")}
    other = toy_dataset(tmp_path / "ds", [[30, 25], [22]], recipes=changed)
    with pytest.raises(UserError, match="state that this run began with is not here"):
        train(other.uri, tmp_path / "run", config("steps=2"))
    with pytest.raises(UserError, match=r"dataset\.stages\.mel\.settings\.filterbank was 'htk', is 'slaney'"):
        train(other.uri, tmp_path / "run", config("steps=2", "data.index=current"))


def test_statistics_of_the_mel_are_over_all_datasets(toy: str, tmp_path: Path) -> None:
    toy_dataset(tmp_path, [[60], [70]])
    uris = (toy, str(tmp_path))
    tables = [load_clips(uri, "train", 13, {}) for uri in uris]
    mels = [
        read_fields(Dataset(uri), shard, clip, ["mel"])["mel"].ravel()
        for uri in uris
        for shard in Dataset(uri).index().shards
        for clip in shard.clips
    ]
    every = np.concatenate(mels).astype(np.float64)
    np.testing.assert_allclose(mel_statistics(tables), (every.mean(), every.std()), rtol=1e-6)


def test_a_finished_run_is_left_alone(toy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(toy, tmp_path, config("steps=2"))
    before = sorted(os.listdir(tmp_path))
    overrides = [part for override in SMALL for part in ("--set", override)]
    assert main(["train", toy, str(tmp_path), "--steps", "2", *overrides]) == 0
    assert "at step 2 already" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == before


def test_bfloat16_trains(toy: str, tmp_path: Path) -> None:
    result = train(toy, tmp_path, config("steps=2", "amp=true"))
    assert np.isfinite(result.last)


def test_clear_errors(toy: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lip_weights"):
        train(toy, tmp_path, train_config(None, ["size=paper", "profile=null", "data.batch=2"]))
    with pytest.raises(UserError, match=r"built with profile \w+, this run expects paper"):
        train(toy, tmp_path, train_config(None, ["size=paper", "data.batch=2"]))
    with pytest.raises(UserError, match=r"2 samples of data\.batch cannot be split into 3"):
        train(toy, tmp_path, config("accumulate=3"))
    with pytest.raises(UserError, match="units follows from the dataset"):
        train(toy, tmp_path, config("model.units=5"))
    (tmp_path / "step-00000001.pt").write_bytes(b"junk")
    with pytest.raises(UserError, match="not a checkpoint"):
        train(toy, tmp_path, config())
    assert not list(tmp_path.glob("events*"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu_is_said(toy: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no GPU"):
        train(toy, tmp_path, config("device=cuda"))


def test_a_loss_that_is_not_finite_names_the_clips(toy: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"step \d+: the loss or its gradient is not finite .*clips are in") as caught:
        train(toy, tmp_path, config("steps=30", "optimiser.lr=1e30", "optimiser.clip_norm=1e30"))
    [note] = tmp_path.glob("step-*-not-finite.json")
    assert str(note) in str(caught.value)
    facts = json.loads(note.read_text())
    with TrainingStream(toy, config().data, 0) as stream:
        assert facts["keys"] == [stream.tables[0].keys[clip] for _, clip, _ in stream.global_clips(facts["step"])]
    assert "nan" in {facts["values"]["loss"], facts["values"]["grad_norm"]} or "inf" in str(facts["values"])


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_shards_are_named(tmp_path: Path, workers: int) -> None:
    dataset = toy_dataset(tmp_path / "ds", [[30]])
    shard = dataset.index().shards[0]
    path = dataset.store.path(shard.name)
    data = bytearray(path.read_bytes())
    offset, size = shard.clips[0].members["lips"]
    data[offset : offset + size] = bytes(size)
    path.write_bytes(data)
    with pytest.raises(UserError, match=shard.name):
        train(dataset.uri, tmp_path / "run", config("steps=1", f"data.workers={workers}"))


def test_learning_and_speaking(built: Built, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset, _ = built
    run = tmp_path / "run"
    result = train(dataset.uri, run, config("steps=40", "data.batch=4", "log_every=10", "optimiser.lr=3e-3"))
    assert result.last < 0.8 * result.first
    clip = next(row for row in dataset.clips() if row.split == "test" and row.state == "packed")
    out = tmp_path / "out.mp4"
    arguments = ["synthesize", clip.uri, "--checkpoint", str(run), "--steps", "2"]
    assert main([*arguments, "-o", str(out)]) == 0
    assert "Griffin-Lim" in capsys.readouterr().out
    with wave.open(str(out.with_suffix(".wav"))) as reader:
        assert (reader.getframerate(), reader.getnframes()) == (16000, 640 * clip.frames)
        samples = np.frombuffer(reader.readframes(reader.getnframes()), "<i2")
    assert samples.std() > 10
    with av.open(str(out)) as container:
        assert sum(1 for _ in container.decode(video=0)) == clip.frames
        assert container.streams.audio[0].rate == 16000
    # The same seed speaks the same, another one does not; without a sound stream it works as well.
    silent = tmp_path / "silent.mp4"
    _strip_sound(Path(clip.uri), silent)
    arguments[1] = str(silent)
    assert main([*arguments, "-o", str(tmp_path / "same.wav")]) == 0
    assert main([*arguments, "-o", str(tmp_path / "other.wav"), "--seed", "5"]) == 0
    assert (tmp_path / "same.wav").read_bytes() == out.with_suffix(".wav").read_bytes()
    assert (tmp_path / "other.wav").read_bytes() != out.with_suffix(".wav").read_bytes()
    # What cannot be spoken for is one line.
    capsys.readouterr()
    faulty = Path(next(row.uri for row in dataset.quarantine() if row.reason == "no_face"))
    arguments[1] = str(faulty)
    assert main([*arguments, "-o", str(tmp_path / "none.wav")]) == 2
    error = capsys.readouterr().err
    assert "no_face" in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "none.wav").exists()


def _strip_sound(source: Path, target: Path) -> None:
    with av.open(str(source)) as container, av.open(str(target), "w") as out:
        stream = out.add_stream_from_template(container.streams.video[0])
        for packet in container.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                out.mux(packet)

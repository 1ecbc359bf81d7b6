"""The docs say what the code does: every default, every field, every reason."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

from model.config import PRESETS, ModelConfig
from model.train_config import TINY, TrainConfig
from pipeline.config import PROFILES, BuildConfig
from pipeline.stage import Reason
from shards.schema import FIELDS

DOCS = Path(__file__).resolve().parent.parent / "docs"
FROM_THE_DATASET = {"identity_dim", "expression_dim", "timbre_dim", "units"}


def test_configuration_shows_the_defaults() -> None:
    text = (DOCS / "configuration.md").read_text()
    build, paper, train, tiny, model, tiny_model = (
        yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.S)
    )
    assert build == BuildConfig().model_dump(mode="json")
    assert paper == PROFILES["paper"]
    assert train == TrainConfig().model_dump(mode="json")
    assert tiny == TINY
    defaults = ModelConfig().model_dump(mode="json")
    assert model == {key: value for key, value in defaults.items() if key not in FROM_THE_DATASET}
    preset = json.loads(json.dumps(PRESETS["tiny"]))
    assert tiny_model == {key: value for key, value in preset.items() if key not in FROM_THE_DATASET}


def test_dataset_lists_every_field_and_reason() -> None:
    text = (DOCS / "dataset.md").read_text()
    for field in FIELDS.values():
        shape = "×".join(map(str, field.shape)) or "-"
        cells = [f"`{field.name}`", f"`.{field.suffix}`", field.dtype, shape, field.unit, field.stage, field.about]
        assert f"| {' | '.join(cells)} |" in text
    for reason in Reason:
        assert f"`{reason.value}`" in text

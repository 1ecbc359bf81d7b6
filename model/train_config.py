"""Configuration of a training run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from model.config import PRESETS, ModelConfig
from model.run_config import AdamWConfig, RunConfig
from shards.config import Config, load_config, merge
from shards.errors import UserError
from shards.layout import NEEDED
from shards.manifest import Index
from shards.stream_config import StreamConfig


class OptimiserConfig(AdamWConfig):
    """AdamW as the paper states it; weight decay and clipping are not stated there.

    Attributes:
        lip_lr: rate of the lip encoder where it is trained; null: `lr`.
    """

    lip_lr: float | None = Field(1e-5, gt=0)


class ValidationConfig(Config):
    """What is looked at between training steps.

    Attributes:
        every: steps; 0 switches it off.
        split: of the dataset (of a mixture's first one).
        clips: how many of it, drawn once.
        max_frames: video frames of a batch, padding included.
        samples: clips that are spoken for into TensorBoard, as sound and mel.
        steps, guidance: of their synthesis.
    """

    every: int = Field(5000, ge=0)
    split: str = "valid"
    clips: int = Field(200, ge=1)
    max_frames: int = Field(2000, ge=1)
    samples: int = Field(4, ge=0)
    steps: int = Field(10, ge=1)
    guidance: float = Field(0.7, ge=0)


class TrainConfig(RunConfig):
    """A training run.

    Attributes:
        size: which preset `model` lies upon.
        profile: the dataset must be of this one; null takes any.
        model: keys that differ from the preset.
        lip_weights: AV-HuBERT file for the lip encoder, public or converted; a frozen one cannot do without.
        accumulate: parts that a process's share of a batch is split into; less memory, the same gradient.
        compile: torch.compile; where that fails the run says so and goes on without.
    """

    size: Literal["paper", "tiny"] = "paper"
    profile: Literal["paper", "offline"] | None = "paper"
    model: dict[str, Any] = {}
    lip_weights: Path | None = None
    optimiser: OptimiserConfig = OptimiserConfig()
    validation: ValidationConfig = ValidationConfig()
    accumulate: int = Field(1, ge=1)
    compile: bool = True

    @field_validator("data")
    @classmethod
    def _whole_samples(cls, data: StreamConfig) -> StreamConfig:
        missing = [name for name in NEEDED if name not in data.fields]
        if missing:
            raise ValueError(f"fields: this network needs {', '.join(missing)} as well")
        return data


TINY: dict[str, Any] = {
    "profile": None,
    "data": {"batch": 8, "crop_frames": 50, "workers": 1, "augment": {"erase": 0.0, "mask_frames": 0}},
    "optimiser": {"lr": 1e-3, "lip_lr": None, "warmup": 50},
    "validation": {"every": 1000, "clips": 32, "samples": 2},
    "amp": False,
    "compile": False,
    "checkpoint_every": 200,
}
"""What goes with `size: tiny`, under the user's own file and overrides. In a run of minutes, erasing and masking cost
more than they give: half the unit accuracy on held-out clips after 150 steps."""


def train_config(path: Path | None, overrides: Sequence[str]) -> TrainConfig:
    """Defaults of the chosen size, then the YAML file, then the overrides.

    Raises:
        UserError: see `load_config`.
    """
    size = load_config(TrainConfig, path, overrides).size
    return load_config(TrainConfig, path, overrides, base=TINY if size == "tiny" else None)


def check_profile(index: Index, config: TrainConfig) -> None:
    """Raises UserError: the dataset is of another profile than the run expects."""
    if config.profile is not None and index.profile != config.profile:
        raise UserError(
            f"the dataset was built with profile {index.profile}, this run expects {config.profile} (size "
            f"{config.size}); give its dataset, or set profile={index.profile} to train on this one"
        )


def dataset_facts(index: Index, split: str) -> dict[str, Any]:
    """What a checkpoint remembers of its dataset: enough to prepare a new video in the same way.

    Raises:
        UserError: the shards of the split were not all made in one way.
    """
    return {
        "profile": index.profile,
        "widths": index.widths,
        "stages": {stage: recipe.model_dump(mode="json") for stage, recipe in index.recipe(split).items()},
        "schema_version": index.schema_version,
    }


def model_config(config: TrainConfig, dataset: dict[str, Any]) -> ModelConfig:
    """The preset, the widths that the dataset's networks set, and the user's keys over both.

    Args:
        dataset: what `dataset_facts` says of the shards.

    Raises:
        UserError: an unknown key, or one that follows from the dataset.
    """
    widths = {
        "identity_dim": dataset["widths"]["D_identity"],
        "expression_dim": dataset["widths"]["D_expression"],
        "timbre_dim": dataset["widths"]["D_timbre"],
        "units": dataset["stages"]["speech"]["settings"]["clusters"],
    }
    for key in sorted(set(widths) & set(config.model)):
        raise UserError(f"model.{key} follows from the dataset ({widths[key]}); leave it out")
    return load_config(ModelConfig, base=merge({**PRESETS[config.size], **widths}, config.model))

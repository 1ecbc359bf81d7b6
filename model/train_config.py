"""Configuration of a training run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from model.config import PRESETS, ModelConfig
from shards.config import Config, load_config, merge
from shards.errors import UserError
from shards.manifest import Index
from shards.stream import StreamConfig

Share = Annotated[float, Field(ge=0, lt=1)]


class OptimiserConfig(Config):
    """AdamW as the paper states it; weight decay and clipping are not stated there.

    Attributes:
        decay: factor on the learning rate per epoch.
        warmup: steps over which the rate rises from zero.
        clip_norm: bound on the norm of the gradient of all parameters together.
        lip_lr: rate of the lip encoder where it is trained; null: `lr`.
    """

    lr: float = Field(1e-4, gt=0)
    lip_lr: float | None = Field(1e-5, gt=0)
    betas: tuple[Share, Share] = (0.8, 0.99)
    eps: float = Field(1e-9, ge=0)
    weight_decay: float = Field(0.01, ge=0)
    decay: float = Field(0.999 ** (1 / 8), gt=0, le=1)
    warmup: int = Field(0, ge=0)
    clip_norm: float = Field(5.0, gt=0)


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


class TrainConfig(Config):
    """A training run.

    Attributes:
        size: which preset `model` lies upon.
        profile: the dataset must be of this one; null takes any.
        model: keys that differ from the preset.
        begin: checkpoint or run folder whose parameters a new run begins with, in place of random ones.
        lip_weights: AV-HuBERT file for the lip encoder, public or converted; a frozen one cannot do without.
        accumulate: parts that a process's share of a batch is split into; less memory, the same gradient.
        ema: decay of a moving average of the parameters, which validation and synthesis then use; null keeps none.
        steps: optimiser steps in all.
        minutes: stop after this long, with a checkpoint.
        threads: torch threads; 0 keeps torch's own choice.
        amp: bfloat16 autocast (losses stay float32).
        compile: torch.compile; where that fails the run says so and goes on without.
        peak_tflops: what utilisation is measured against; null measures a large matrix product at the start.
        keep: checkpoints; older ones are deleted.
        keep_every: those of multiples of this many steps stay.
    """

    size: Literal["paper", "tiny"] = "paper"
    profile: Literal["paper", "offline"] | None = "paper"
    model: dict[str, Any] = {}
    begin: str | None = None
    lip_weights: Path | None = None
    data: StreamConfig = StreamConfig()
    optimiser: OptimiserConfig = OptimiserConfig()
    validation: ValidationConfig = ValidationConfig()
    accumulate: int = Field(1, ge=1)
    ema: float | None = Field(None, gt=0, lt=1)
    steps: int = Field(350_000, ge=1)
    minutes: float | None = Field(None, gt=0)
    seed: int = Field(0, ge=0, lt=2**31)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    amp: bool = True
    compile: bool = True
    peak_tflops: float | None = Field(None, gt=0)
    threads: int = Field(0, ge=0)
    log_every: int = Field(20, ge=1)
    checkpoint_every: int = Field(1000, ge=1)
    keep: int = Field(3, ge=1)
    keep_every: int | None = Field(None, ge=1)


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

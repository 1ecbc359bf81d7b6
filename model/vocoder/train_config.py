"""Configuration of a vocoder's training run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from model.run_config import AdamWConfig, RunConfig, Share
from model.vocoder.config import DISCRIMINATORS, GENERATORS, DiscriminatorConfig, GeneratorConfig
from model.vocoder.losses import MEL_WEIGHT
from model.vocoder.robust import RobustConfig
from shards.config import Config, load_config, merge
from shards.errors import UserError
from shards.stream_config import StreamConfig


class VocoderOptimiser(AdamWConfig):
    """AdamW of the generator and, by itself, of the discriminators, as HiFi-GAN states it."""

    lr: float = Field(2e-4, gt=0)
    betas: tuple[Share, Share] = (0.8, 0.99)
    eps: float = Field(1e-8, ge=0)
    decay: float = Field(0.999, gt=0, le=1)
    clip_norm: float | None = Field(None, gt=0)


class VocoderValidation(Config):
    """What is looked at between training steps, on whole clips.

    Attributes:
        every: steps; 0 switches it off.
        split: of the dataset (of a mixture's first one).
        clips: how many of it, drawn once.
        max_frames: video frames of a batch, padding included.
        samples: clips that are spoken into TensorBoard.
        griffin_lim: measure Griffin-Lim on the same clips as well, once.
    """

    every: int = Field(5000, ge=0)
    split: str = "valid"
    clips: int = Field(100, ge=1)
    max_frames: int = Field(500, ge=1)
    samples: int = Field(4, ge=0)
    griffin_lim: bool = True


class VocoderConfig(RunConfig):
    """A vocoder's training run; the defaults are HiFi-GAN's, with segments of 8960 samples.

    Attributes:
        size: which presets `model` and `discriminators` lie upon.
        model: keys of the generator that differ from the preset.
        discriminators: keys of the discriminators that differ from the preset.
        begin: checkpoint or folder of a vocoder's run, or public HiFi-GAN file (its generator alone), whose parameters
            a new run begins with, in place of random ones.
        data: `fields` are wav and mel, and units and timbre where the generator is to read them too.
        robust: what is changed in samples, so that the vocoder bears mels that a network predicted.
        discriminator_from: step from which the discriminators are trained and heard; before, the mel loss alone counts.
        mel_weight: of the mel loss.
        ema: decay of a moving average of the generator, which validation and speech then use; null keeps none.
    """

    size: Literal["paper", "tiny"] = "paper"
    model: dict[str, Any] = {}
    discriminators: dict[str, Any] = {}
    data: StreamConfig = StreamConfig(batch=16, crop_frames=14, min_frames=14, fields=("wav", "mel"))
    optimiser: VocoderOptimiser = VocoderOptimiser()
    validation: VocoderValidation = VocoderValidation()
    robust: RobustConfig = RobustConfig()
    discriminator_from: int = Field(0, ge=0)
    mel_weight: float = Field(MEL_WEIGHT, gt=0)
    steps: int = Field(1_000_000, ge=1)
    amp: bool = False

    @field_validator("data")
    @classmethod
    def _sound(cls, data: StreamConfig) -> StreamConfig:
        if not {"wav", "mel"} <= set(data.fields) <= {"wav", "mel", "units", "timbre"}:
            raise ValueError("fields: a vocoder reads wav and mel, and units and timbre if it is to; no others")
        if data.crop_frames < 2:
            raise ValueError("crop_frames: a segment has two video frames at least")
        return data


BASE: dict[str, Any] = {"data": VocoderConfig().data.model_dump(mode="json", exclude_defaults=True)}
"""What a vocoder reads in place of the stream's own defaults, where a file or an override names some keys of `data`."""
TINY: dict[str, Any] = {
    "data": {"batch": 8, "workers": 0},
    "optimiser": {"lr": 2e-3, "warmup": 50, "decay": 0.975, "clip_norm": 1000.0},
    "validation": {"every": 1000, "clips": 16, "samples": 2},
    "discriminator_from": 20_000,
    "ema": 0.995,
    "steps": 20_000,
    "checkpoint_every": 500,
}
"""What goes with `size: tiny`, under the user's own file and overrides. In a run of minutes the mel loss alone teaches
more than the discriminators, which take most of a step's time; they begin where that run ends."""


def vocoder_config(path: Path | None, overrides: Sequence[str]) -> VocoderConfig:
    """Defaults of the chosen size, then the YAML file, then the overrides.

    Raises:
        UserError: see `load_config`.
    """
    size = load_config(VocoderConfig, path, overrides, base=BASE).size
    return load_config(VocoderConfig, path, overrides, base=merge(BASE, TINY) if size == "tiny" else BASE)


def network_configs(config: VocoderConfig, dataset: dict[str, Any]) -> tuple[GeneratorConfig, DiscriminatorConfig]:
    """The presets, what the dataset sets, and the user's keys over both.

    Args:
        dataset: what `dataset_facts` says of the shards.

    Raises:
        UserError: an unknown key, or one that follows from the dataset.
    """
    fields = config.data.fields
    given = {
        "units": dataset["stages"]["speech"]["settings"]["clusters"] if "units" in fields else 0,
        "timbre_dim": dataset["widths"]["D_timbre"] if "timbre" in fields else 0,
    }
    for key in sorted(set(given) & set(config.model)):
        raise UserError(f"model.{key} follows from the dataset and data.fields ({given[key]}); leave it out")
    generator = load_config(GeneratorConfig, base=merge({**GENERATORS[config.size], **given}, config.model))
    return generator, load_config(DiscriminatorConfig, base=merge(DISCRIMINATORS[config.size], config.discriminators))

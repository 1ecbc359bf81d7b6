"""What a training job reads, and how."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from shards.augment import AugmentConfig
from shards.config import Config
from shards.layout import NEEDED, SampleField
from shards.pitch import PitchMode


class Condition(Config):
    """What a column of the clip table must be. Clips whose value is missing meet no condition.

    Attributes:
        one_of, none_of: allowed and forbidden values.
        at_least, at_most: bounds, for numbers.
    """

    one_of: tuple[str | int | float, ...] | None = None
    none_of: tuple[str | int | float, ...] = ()
    at_least: float | None = None
    at_most: float | None = None


class SourceConfig(Config):
    """One more dataset of a mixture.

    Attributes:
        uri: of the dataset.
        weight: share of the samples, in the unit of the other weights.
        where: as of the stream.
    """

    uri: str
    weight: float = Field(1.0, gt=0)
    where: dict[str, Condition] = {}


class StreamConfig(Config):
    """What a training job reads.

    Attributes:
        split: of the dataset.
        where: conditions that a clip must meet, by column of the clip table (`speaker`, `key`, ...) or `duration`
            in seconds.
        weight: share of this dataset where `mix` names others.
        mix: other datasets to draw from as well.
        fields: what a sample holds; nothing else is read.
        batch: samples per global step.
        crop_frames: video frames per sample; shorter clips are padded and masked.
        min_frames: shorter clips are left out.
        window: shards that clips are drawn from at the same time.
        pitch: how pitch is standardised over each whole clip.
        augment: of the lips.
        augment_on: `device` augments batches where the network runs, `worker` before; the values are the same.
        workers: processes that fill batches; 0 fills them in the training process.
        prefetch: steps that workers are ahead.
        cache: folder for shards of remote datasets; default in the user's cache folder.
        cache_bytes: how large it may get, all processes of a machine together.
        ahead: shards that are fetched before they enter the window.
        verify: compare shards of local datasets with the index's sha256 when a process first uses them (remote
            ones always are).
        damaged: whether a damaged shard stops the run or is skipped, its clips replaced by the ones after them.
        index: `first` keeps a resumed run on the state of the dataset that it began with; `current` takes the newest.
    """

    split: str = "train"
    where: dict[str, Condition] = {}
    weight: float = Field(1.0, gt=0)
    mix: tuple[SourceConfig, ...] = ()
    fields: tuple[SampleField, ...] = NEEDED
    batch: int = Field(64, ge=1)
    crop_frames: int = Field(96, ge=1)
    min_frames: int = Field(13, ge=1)
    window: int = Field(4, ge=1)
    pitch: PitchMode = "zero"
    augment: AugmentConfig = AugmentConfig()
    augment_on: Literal["device", "worker"] = "device"
    workers: int = Field(2, ge=0)
    prefetch: int = Field(2, ge=1)
    cache: Path | None = None
    cache_bytes: int = Field(20_000_000_000, ge=1)
    ahead: int = Field(2, ge=0)
    verify: bool = True
    damaged: Literal["stop", "skip"] = "stop"
    index: Literal["first", "current"] = "first"

    @field_validator("fields")
    @classmethod
    def _each_once(cls, names: tuple[SampleField, ...]) -> tuple[SampleField, ...]:
        if not names or len(set(names)) < len(names):
            raise ValueError("name at least one field, and none twice")
        return names

"""Configuration of a build: one section per stage, plus source, packing and execution."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.segment import SegmentConfig
from pipeline.sources import SourceConfig
from pipeline.stages.audio import AudioConfig
from pipeline.stages.energy import EnergyConfig
from pipeline.stages.expression import ExpressionConfig
from pipeline.stages.faces import FacesConfig
from pipeline.stages.identity import IdentityConfig
from pipeline.stages.landmarks import LandmarksConfig
from pipeline.stages.lips import LipsConfig
from pipeline.stages.mel import MelConfig
from pipeline.stages.pitch import PitchConfig
from pipeline.stages.speech import SpeechConfig
from pipeline.stages.sync import SyncConfig
from shards.config import Config, merge
from shards.errors import UserError
from shards.schema import FIELDS, VIDEO_RATE

Profile = Literal["offline", "paper"]
PROFILES: dict[str, dict[str, Any]] = {
    "offline": {},
    "paper": {
        "faces": {"network": "retinaface_resnet50"},
        "landmarks": {"network": "fan4"},
        "identity": {"network": "iresnet50", "every": 1},
        "expression": {"network": "swin"},
        "speech": {"encoder": "hubert_large", "layer": 24, "clusters": 1000},
    },
}
"""Defaults that a profile changes: `offline` runs small networks that packages carry, `paper` the paper's."""


class PackConfig(Config):
    """Packed shards.

    Attributes:
        shard_clips: clips per shard; a clip stays in its shard for the dataset's life.
        fields: what trainers get; `meta` is always there.
        lips: `jpg` as in the columns; or `npy`, the same pixels decoded, for about 4.4 times the bytes of lips.
    """

    shard_clips: int = Field(256, ge=1)
    fields: tuple[str, ...] = tuple(name for name, field in FIELDS.items() if not field.optional)
    lips: Literal["jpg", "npy"] = "jpg"

    @property
    def raw(self) -> tuple[str, ...]:
        """Fields that the schema stores as `jpg` and packed shards get as `npy`."""
        return ("lips",) if self.lips == "npy" and "lips" in self.fields else ()

    @field_validator("fields")
    @classmethod
    def _known(cls, fields: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [name for name in fields if name not in FIELDS]
        if unknown or not set(fields) - {"meta"}:
            wrong = f"no field {unknown[0]!r}" if unknown else "name at least one field besides meta"
            raise ValueError(f"{wrong}; choose from {', '.join(FIELDS)}")
        return fields


class RunConfig(Config):
    """Execution; never part of a fingerprint.

    Attributes:
        ray_address: address of a running Ray cluster; None starts Ray on this machine.
        cpus: processors to use on this machine when Ray is started here; None takes all.
        object_store_mb: shared memory of a Ray started here (only small records pass through it).
        retries: how often work that lost its worker is given out again; as often a clip is tried alone whose worker
            died on it. A lost machine does not count.
        clip_timeout: seconds after which a worker that has not come on with a clip is ended. FAN-4 in float32 on one
            processor takes 1050 for the longest clip, of a minute.
        memory_gb: memory of a worker (1e9 bytes) beyond which it is ended.
        max_cpus, max_gpus: how far the cluster may grow: workers are asked for up to this, which is what makes an
            autoscaler start machines. None: what is there.
        wait_minutes: how long a build waits for a machine where it can go on with nothing else.
        prices: of an hour of a machine by its kind (`cpu`, `gpu`, `head`, or its Ray label `f2v.node`), in any unit.
        gpus: share of a GPU for each worker of a stage whose network runs in torch; 0 keeps them on processors.
        weights: folder with checkpoints of the `paper` networks; None takes the one that F2V_WEIGHTS names. What is not
            there is looked for in the user's cache, and fetched.
    """

    ray_address: str | None = None
    cpus: int | None = Field(None, ge=1)
    object_store_mb: int = Field(256, ge=80)
    retries: int = Field(2, ge=0)
    clip_timeout: float = Field(1800.0, gt=0)
    memory_gb: float = Field(8.0, gt=0)
    max_cpus: int | None = Field(None, ge=1)
    max_gpus: float | None = Field(None, gt=0)
    wait_minutes: float = Field(15.0, ge=0)
    prices: dict[str, Annotated[float, Field(ge=0)]] = {}
    gpus: float = Field(0.0, ge=0)
    weights: Path | None = None

    @field_validator("gpus")
    @classmethod
    def _share_or_whole(cls, gpus: float) -> float:
        if gpus > 1 and not gpus.is_integer():
            raise ValueError("a share of one GPU (at most 1), or a whole number of GPUs")
        return gpus

    @field_validator("weights")
    @classmethod
    def _from_anywhere(cls, folder: Path | None) -> Path | None:
        folder = folder or (Path(os.environ["F2V_WEIGHTS"]) if os.environ.get("F2V_WEIGHTS") else None)
        return folder.absolute() if folder else None  # workers may run in another folder


class BuildConfig(Config):
    """All of a build. Stage sections enter that stage's fingerprint; keys that are left out come from the profile."""

    profile: Profile = "offline"
    source: SourceConfig = SourceConfig()
    segment: SegmentConfig = SegmentConfig()
    pack: PackConfig = PackConfig()
    run: RunConfig = Field(default_factory=RunConfig)  # looks at the environment
    faces: FacesConfig = FacesConfig()
    landmarks: LandmarksConfig = LandmarksConfig()
    lips: LipsConfig = LipsConfig()
    identity: IdentityConfig = IdentityConfig()
    expression: ExpressionConfig = ExpressionConfig()
    audio: AudioConfig = AudioConfig()
    sync: SyncConfig = SyncConfig()
    mel: MelConfig = MelConfig()
    pitch: PitchConfig = PitchConfig()
    energy: EnergyConfig = EnergyConfig()
    speech: SpeechConfig = SpeechConfig()

    @model_validator(mode="before")
    @classmethod
    def _over_the_profile(cls, tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        return merge(PROFILES.get(str(tree.get("profile", "offline")), {}), tree)

    @model_validator(mode="after")
    def _features_are_kept(self) -> BuildConfig:
        if "features" in self.pack.fields and not self.speech.keep_features:
            raise UserError("pack.fields names features, which are stored only with speech.keep_features=true")
        return self

    @model_validator(mode="after")
    def _stages_take_segments(self) -> BuildConfig:
        cut = self.segment
        if not cut.enabled:
            return self
        for name, most in (("faces", self.faces.max_seconds), ("audio", self.audio.max_seconds)):
            if cut.max_seconds > most:
                raise UserError(
                    f"segment.max_seconds = {cut.max_seconds:g} gives clips that are too long for "
                    f"{name}.max_seconds = {most:g}; lower the one or raise the other"
                )
        if cut.min_seconds * VIDEO_RATE < self.faces.min_frames:
            raise UserError(
                f"segment.min_seconds = {cut.min_seconds:g} gives clips that are too short for faces.min_frames = "
                f"{self.faces.min_frames} ({self.faces.min_frames / VIDEO_RATE:g} s); raise the one or lower the other"
            )
        return self

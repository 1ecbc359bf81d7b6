"""The stages in the order in which they depend on each other, and the check that they fit together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.config import BuildConfig
from pipeline.stage import Stage
from pipeline.stages.audio import Audio
from pipeline.stages.energy import Energy
from pipeline.stages.expression import Expression
from pipeline.stages.faces import Faces
from pipeline.stages.identity import Identity
from pipeline.stages.landmarks import Landmarks
from pipeline.stages.lips import Lips
from pipeline.stages.mel import Mel
from pipeline.stages.pitch import Pitch
from pipeline.stages.speech import Speech
from pipeline.stages.sync import Sync
from shards.schema import FIELDS

StageClass = type[Stage[Any]]

STAGES: tuple[StageClass, ...] = (
    Faces,
    Landmarks,
    Lips,
    Identity,
    Expression,
    Audio,
    Sync,
    Mel,
    Pitch,
    Energy,
    Speech,
)
KINDS: dict[str, StageClass] = {kind.name: kind for kind in STAGES}
VISUAL_STAGES: tuple[StageClass, ...] = (Faces, Landmarks, Lips, Identity, Expression)
"""What synthesis from a silent video needs."""


def writers(stages: Sequence[StageClass]) -> dict[str, StageClass]:
    """Field name -> the stage that writes it, for stages given in dependency order.

    Raises:
        ValueError: a stage reads a field that no earlier stage writes, two stages write the same field, or the schema
            names another writer.
    """
    made: dict[str, StageClass] = {}
    for stage in stages:
        for name in stage.reads:
            if name not in made:
                raise ValueError(f"stage {stage.name} reads {name!r}, which no stage before it writes")
        for name in stage.writes:
            if name in made:
                raise ValueError(f"stages {made[name].name} and {stage.name} both write {name!r}")
            if name not in FIELDS or FIELDS[name].stage != stage.name:
                raise ValueError(f"stage {stage.name} writes {name!r}, which the schema does not give to it")
            made[name] = stage
    return made


def upstream(stage: StageClass, made: dict[str, StageClass]) -> list[str]:
    """Names of the stages whose columns `stage` reads, sorted."""
    return sorted({made[name].name for name in stage.reads})


def make_stage(kind: StageClass, config: BuildConfig, centroids: Path | None) -> Stage[Any]:
    """A stage with its section of the configuration; `centroids` are the dataset's own when the section names none."""
    section = getattr(config, kind.name)
    if kind is Speech and section.centroids is None:
        section = section.model_copy(update={"centroids": centroids})
    return kind(section, config.run.weights)

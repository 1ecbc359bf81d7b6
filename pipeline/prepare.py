"""The visual stages on one new video, in this process: what synthesis feeds its network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.config import BuildConfig
from pipeline.fingerprint import weights_digest
from pipeline.registry import VISUAL_STAGES, make_stage
from pipeline.stage import Clip, Fields, Item, Rejection
from shards.config import load_config
from shards.errors import UserError


def visual_fields(video: Path, profile: str, recipes: dict[str, dict[str, Any]]) -> Fields:
    """Run faces, landmarks, lips, identity and expression on a video as the training shards were made.

    Args:
        profile: of the dataset.
        recipes: stage -> version, settings and weights' digest, as the dataset recorded them.

    Raises:
        UserError: the video cannot be used (with the reason that quarantine would name), or a stage here runs other
            weights than the dataset's.
    """
    sections = {kind.name: recipes[kind.name]["settings"] for kind in VISUAL_STAGES}
    settings = load_config(BuildConfig, base={"profile": profile, **sections})
    clip = Clip(key=video.name, uri=str(video), digest="")
    fields: Fields = {}
    for kind in VISUAL_STAGES:
        stage = make_stage(kind, settings, None)
        if weights_digest(stage.weights()) != recipes[kind.name]["weights"]:
            raise UserError(
                f"stage {kind.name}: its network files differ from the ones the training shards were made with"
            )
        stage.setup()
        result = stage.attempt(Item(clip, {name: fields[name] for name in kind.reads}))
        if isinstance(result, Rejection):
            raise UserError(f"{video}: {result.reason.value}: {result.message.removeprefix(f'{video}: ')}")
        fields.update(result)
    return fields

"""What the rows of `benchmarks/stages.py` share: the calls of a row, and the clips they work on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from pipeline.media import decode_video
from pipeline.networks import weights
from pipeline.networks.device import Precision
from pipeline.stage import Clip, Item, Rejection, Stage
from pipeline.stages.audio import Audio, AudioConfig
from pipeline.stages.faces import Faces, FacesConfig
from pipeline.stages.landmarks import Landmarks, LandmarksConfig
from pipeline.stages.lips import Lips, LipsConfig
from pipeline.stages.mel import Mel, MelConfig
from shards.schema import SAMPLE_RATE, VIDEO_RATE

Call = Callable[[], object]


@dataclass
class Case:
    """Calls on the same input.

    Attributes:
        stage: and its network.
        seconds: of video that each call works on.
        peer: the usual code.
        ours: the stage, by precision.
        bare: the network alone on ready input, by precision.
        decode: the stage's decoding alone.
        padding: share of the computed frames that is padding.
    """

    stage: str
    seconds: float
    peer: Call | None = None
    ours: dict[str, Call] = field(default_factory=dict)
    bare: dict[str, Call] = field(default_factory=dict)
    decode: Call | None = None
    padding: float | None = None


@dataclass(frozen=True)
class Setting:
    """What all rows share: items with every offline field, a folder for checkpoints, precisions and device."""

    items: list[Item]
    folder: Path
    precisions: Sequence[Precision]
    device: torch.device

    def cut(self, frames: int) -> list[Item]:
        """The beginning of the first clip."""
        item = self.items[0]
        clip = Clip(item.clip.key, item.clip.uri, "", start=0, end=frames / VIDEO_RATE)
        per = {"wav": 640, "mel": 2, "pitch": 2}
        fields = {name: value[: frames * per.get(name, 1)] for name, value in item.fields.items() if name != "track"}
        return [Item(clip, fields)]


def prepare_items(paths: Sequence[Path], count: int) -> list[Item]:
    """The first `count` clips that no stage refuses, with the fields of the offline stages."""
    stages: list[Stage[Any]] = [Faces(FacesConfig()), Landmarks(LandmarksConfig()), Lips(LipsConfig())]
    stages += [Audio(AudioConfig()), Mel(MelConfig())]
    for stage in stages:
        stage.setup()
    found: list[Item] = []
    for path in paths:
        if len(found) == count:
            break
        item = Item(Clip(path.stem, str(path), ""))
        for stage in stages:
            result = stage.attempt(item)
            if isinstance(result, Rejection):
                print(f"left out {path.name}: {result.message}")
                break
            item = Item(item.clip, {**item.fields, **result})
        else:
            found.append(item)
    return found


def whole(stage: Stage[Any], items: Sequence[Item]) -> Call:
    """The stage over all items.

    Raises:
        RuntimeError: it refuses one.
    """

    def call() -> None:
        for item, result in stage.process(items):
            if isinstance(result, Rejection):
                raise RuntimeError(f"{stage.name} {item.clip.uri}: {result.message}")

    return call


def seconds_of(items: Sequence[Item]) -> float:
    return sum(len(item.fields["wav"]) for item in items) / SAMPLE_RATE


def each(call: Callable[[Any], object], inputs: Sequence[Any]) -> Call:
    """The call on every input, without gradients."""

    def run() -> None:
        with torch.inference_mode():
            for one in inputs:
                call(one)

    return run


def decoding(items: Sequence[Item]) -> Call:
    return each(lambda item: sum(1 for _ in decode_video(item.clip.uri, item.clip.start, item.clip.end)), items)


def ready(stage: Stage[Any]) -> Any:
    """The stage, set up from random checkpoints, whose digests cannot be the published ones."""
    with mock.patch.object(weights, "_checked", lambda checkpoint, path: path):
        stage.setup()
    return stage


def plain(setting: Setting, stage: Stage[Any]) -> Case:
    """A stage without a network."""
    stage.setup()
    decode = decoding(setting.items) if stage.name == "lips" else None
    return Case(stage.name, seconds_of(setting.items), ours={"-": whole(stage, setting.items)}, decode=decode)

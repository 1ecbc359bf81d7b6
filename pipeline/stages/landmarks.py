"""68 facial landmarks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from pipeline.networks.device import Precision
from pipeline.prefetch import prefetched
from pipeline.stage import Fields, Item, Stage
from shards.config import Config

Points = Callable[[Sequence[np.ndarray], np.ndarray, np.ndarray], np.ndarray]
"""RGB frames, their boxes [n, 4] and five points [n, 5, 2] -> float32 [n, 68, 2], all in pixels of the frame."""


class LandmarksConfig(Config):
    """The network and what may be saved at the price of other landmarks.

    Attributes:
        network: `dlib`; `fan4`, face-alignment's network; or `fan2`, ibug's, which auto_avsr's preparation runs.
        stacks: hourglasses of a FAN that run; null runs all. Two of `fan4` take half the time.
        flip: average `fan4`'s heat maps with those of the mirrored face, face-alignment's default; off takes half the
            time.
        every: frames from one prediction to the next; between them, landmarks move along in the face's own frame.
        precision: of a FAN's convolutions; bfloat16 suits processors and GPUs that multiply it natively.
    """

    network: Literal["dlib", "fan4", "fan2"] = "dlib"
    stacks: int | None = Field(None, ge=1, le=4)
    flip: bool = True
    every: int = Field(1, ge=1)
    precision: Precision = "float32"

    @model_validator(mode="after")
    def _stacks_are_there(self) -> LandmarksConfig:
        most = {"dlib": 0, "fan4": 4, "fan2": 2}[self.network]
        if self.stacks is not None and self.stacks > most:
            raise ValueError(f"{self.network} has {most or 'no'} stacks, {self.stacks} are asked for")
        return self


class Landmarks(Stage[LandmarksConfig]):
    """Reads `boxes`, `points5` and the media, writes `landmarks`, float32 [F, 68, 2] in pixels of the upright frame.

    Raw predictions, frame by frame; the stages that use them smooth them.
    """

    name: ClassVar[str] = "landmarks"
    version: ClassVar[int] = 1
    reads: ClassVar[tuple[str, ...]] = ("boxes", "points5")
    writes: ClassVar[tuple[str, ...]] = ("landmarks",)
    media: ClassVar[bool] = True

    def on_gpu(self) -> bool:
        """Whether its network runs in torch."""
        return self.config.network != "dlib"

    def weights(self) -> Sequence[Path]:
        """The network's file."""
        if self.config.network == "dlib":
            from pipeline.networks.dlib_face import landmarks_file

            return [landmarks_file()]
        from pipeline.networks.fan import find_fan

        return [find_fan(self.config.network, self.folder)]

    def setup(self) -> None:
        """Load the network."""
        self._batch, self._on_gpu = 1, False
        self._points: Points = self._dlib() if self.config.network == "dlib" else self._fan()

    def _dlib(self) -> Points:
        from pipeline.networks.dlib_face import LandmarkPredictor

        predictor = LandmarkPredictor()
        return lambda frames, _, five: np.stack([predictor.points(*pair) for pair in zip(frames, five, strict=True)])

    def _fan(self) -> Points:
        from pipeline.networks.device import pick_device
        from pipeline.networks.fan import Fan

        config = self.config
        assert config.network != "dlib"
        (path,) = self.weights()
        fan = Fan(path, config.network, config.stacks, config.flip, pick_device(), config.precision)
        self._batch, self._on_gpu = fan.batch, fan.device.type == "cuda"
        return lambda frames, boxes, _: fan.points(frames, boxes)

    def run(self, item: Item) -> Fields:
        """Landmarks of one clip.

        Raises:
            Reject: what decoding finds.
        """
        from pipeline.media import decode_video

        clip, boxes, five = item.clip, item.fields["boxes"], item.fields["points5"]
        keys = key_frames(len(five), self.config.every)
        wanted = np.isin(np.arange(len(five)), keys)
        decoded = zip(decode_video(clip.uri, clip.start, clip.end), wanted, strict=True)
        frames: Iterator[np.ndarray] = (frame for frame, want in decoded if want)
        if self._on_gpu:
            frames = prefetched(frames, 2 * self._batch)
        found = []
        for start in range(0, len(keys), self._batch):
            part = keys[start : start + self._batch]
            found.append(self._points(list(islice(frames, len(part))), boxes[part], five[part]))
        next(frames, None)  # the end of the video, where decoding may find damage
        return {"landmarks": move_along(np.concatenate(found), keys, five)}


def key_frames(count: int, every: int) -> np.ndarray:
    """Numbers of the frames that the network sees: every `every`-th of `count`, and the last."""
    return np.union1d(np.arange(0, count, every), [count - 1])


def move_along(points: np.ndarray, keys: np.ndarray, five: np.ndarray) -> np.ndarray:
    """Points of every frame from those of key frames.

    In the frame of the face, which the track's five points give by a similarity, points move linearly from one key
    frame to the next. So the head's motion is the track's own in every frame, and only the change of the face's shape
    is interpolated.

    Args:
        points: float32 [K, P, 2] in pixels.
        keys: numbers of their frames, rising, the first and the last frame among them.
        five: the track, [F, 5, 2].

    Returns:
        float32 [F, P, 2]; those of the key frames are `points` as they are.
    """
    from pipeline import align

    if len(keys) == len(five):
        return points
    into = [align.similarity(each.astype(np.float64), align.ARCFACE) for each in five]
    shapes: list[np.ndarray | None] = [None] * len(five)
    for key, shape in zip(keys, points, strict=True):
        shapes[key] = align.transform(into[key], shape)
    moved = np.stack(
        [
            (shape - matrix[:, 2]) @ np.linalg.inv(matrix[:, :2]).T
            for matrix, shape in zip(into, align.fill_gaps(shapes), strict=True)
        ]
    ).astype(np.float32)
    moved[keys] = points
    return moved

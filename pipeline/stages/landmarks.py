"""68 facial landmarks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from pipeline.stage import Fields, Item, Stage
from shards.config import Config


class LandmarksConfig(Config):
    """No settings."""


class Landmarks(Stage[LandmarksConfig]):
    """Reads `points5` and the media, writes `landmarks`, float32 [F, 68, 2] in pixels of the upright frame.

    Raw predictions, frame by frame; the stages that use them smooth them.
    """

    name: ClassVar[str] = "landmarks"
    version: ClassVar[int] = 1
    reads: ClassVar[tuple[str, ...]] = ("points5",)
    writes: ClassVar[tuple[str, ...]] = ("landmarks",)
    media: ClassVar[bool] = True

    def weights(self) -> Sequence[Path]:
        """The predictor's file."""
        from pipeline.networks.dlib_face import landmarks_file

        return [landmarks_file()]

    def setup(self) -> None:
        """Load the predictor."""
        from pipeline.networks.dlib_face import LandmarkPredictor

        self._predictor = LandmarkPredictor()

    def run(self, item: Item) -> Fields:
        """Landmarks of one clip.

        Raises:
            Reject: what decoding finds.
        """
        from pipeline.media import decode_video

        clip, five = item.clip, item.fields["points5"]
        frames = decode_video(clip.uri, clip.start, clip.end)
        points = [self._predictor.points(frame, marks) for frame, marks in zip(frames, five, strict=True)]
        return {"landmarks": np.stack(points)}

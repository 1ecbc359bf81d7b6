"""Discrete units and timbre, from one pass of a speech encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from pipeline.stage import Fields, Item, Stage
from shards.config import Config
from shards.errors import UserError
from shards.mel import from_pcm


class SpeechConfig(Config):
    """Units and how their centroids come about.

    Attributes:
        layer: block of the encoder (1-based) whose output is clustered; the third of Whisper tiny's four separates
            phones best.
        clusters: size of the unit inventory.
        centroids: npy file, float32 [clusters, D]; None fits them on the dataset's own training sound.
        fit_frames: frames (50 per second) sampled for that fit.
        seed: of the sample and the fit.
    """

    layer: int = Field(3, ge=1)
    clusters: int = Field(100, ge=2, le=32767)
    centroids: Path | None = None
    fit_frames: int = Field(100_000, ge=1)
    seed: int = Field(1369, ge=0, lt=2**32)


class Speech(Stage[SpeechConfig]):
    """Reads `wav`, writes `units`, int16 [2F], and `timbre`, float32 [D], the first block's mean over the clip."""

    name: ClassVar[str] = "speech"
    version: ClassVar[int] = 1
    reads: ClassVar[tuple[str, ...]] = ("wav",)
    writes: ClassVar[tuple[str, ...]] = ("units", "timbre", "features")

    def weights(self) -> Sequence[Path]:
        """The encoder's file, and the centroids where they are known."""
        from pipeline.networks.ctranslate2 import find_weights

        return [find_weights(), *([self.config.centroids] if self.config.centroids else [])]

    def setup(self) -> None:
        """Load encoder and centroids.

        Raises:
            UserError: no centroids, or ones that do not fit `clusters` or the encoder; no such layer.
        """
        from pipeline.networks.whisper import load_encoder
        from pipeline.units import load_codebook

        config = self.config
        if config.centroids is None:
            raise UserError("speech: no centroids; set speech.centroids to an npy file, or build a dataset to fit them")
        self._encoder = load_encoder()
        if config.layer > len(self._encoder.blocks):
            raise UserError(f"speech.layer {config.layer}: the encoder has {len(self._encoder.blocks)} blocks")
        self._centroids = load_codebook(config.centroids)
        if self._centroids.shape != (config.clusters, self._encoder.width):
            raise UserError(
                f"centroids {config.centroids}: shape {self._centroids.shape}, but speech.clusters is "
                f"{config.clusters} and the encoder's width {self._encoder.width}"
            )

    def run(self, item: Item) -> Fields:
        """Units and timbre of one clip."""
        import numpy as np

        from pipeline.units import assign

        states = self._encoder.states(from_pcm(item.fields["wav"]), self.config.layer)
        timbre = states[1].mean(axis=0, dtype=np.float64).astype(np.float32)
        return {"units": assign(states[self.config.layer], self._centroids), "timbre": timbre}

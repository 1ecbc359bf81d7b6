"""Discrete units and timbre, from one pass of a speech encoder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator

from pipeline.batches import in_batches
from pipeline.networks.device import Precision
from pipeline.networks.encoders import LAYERS, Encoder, SpeechEncoder, encoder_files, make_encoder
from pipeline.stage import Fields, Item, Rejection, Stage
from shards.config import Config
from shards.errors import UserError
from shards.manifest import Recipe
from shards.mel import from_pcm
from shards.schema import HOP

if TYPE_CHECKING:
    from pipeline.units import Floats


class SpeechConfig(Config):
    """The encoder, its units and how their centroids come about.

    Attributes:
        encoder: `whisper_tiny` comes with a package; `hubert_large` is the paper's HuBERT-Large LL60k.
        precision: of the encoder; `bfloat16` is faster on processors and GPUs that multiply it natively.
        layer: block of the encoder (1-based) whose output is clustered; the third of Whisper tiny's four separates
            phones best, the paper takes HuBERT's 24th, the last.
        clusters: size of the unit inventory.
        centroids: npy file, float32 [clusters, D]; None fits them on the dataset's own training sound.
        fit_frames: frames (50 per second) sampled for that fit.
        seed: of the sample and the fit.
        reassignment: of the fit, scikit-learn's `reassignment_ratio`. fairseq's recipe for HuBERT's own units has 0,
            the one of speech2unit 0.5, with which half of all frames of speech fell into one unit.
        keep_features: store the features too (float16, 100 kB per second with HuBERT), so that other centroids need no
            run of the encoder.
    """

    encoder: Encoder = "whisper_tiny"
    precision: Precision = "float32"
    layer: int = Field(3, ge=1)
    clusters: int = Field(100, ge=2, le=32767)
    centroids: Path | None = None
    fit_frames: int = Field(100_000, ge=1)
    seed: int = Field(1369, ge=0, lt=2**32)
    reassignment: float = Field(0.0, ge=0)
    keep_features: bool = False

    @model_validator(mode="after")
    def _has_the_layer(self) -> SpeechConfig:
        if self.layer > LAYERS[self.encoder]:
            raise UserError(f"speech.layer {self.layer}: {self.encoder} has {LAYERS[self.encoder]} layers")
        return self


FITTED = ("clusters", "fit_frames", "seed", "reassignment")
"""Settings that concern the centroids alone, not the features."""


class Speech(Stage[SpeechConfig]):
    """Reads `wav`, writes `units`, int16 [2F], `timbre`, float32 [D], the first layer's mean over the clip, and, where
    they are kept, `features`, float16 [2F, D].

    Clips are encoded in batches of like length, in bfloat16 of equal length. Kept features are rounded before they are
    assigned to centroids, so that units come out the same when they are read back.
    """

    name: ClassVar[str] = "speech"
    version: ClassVar[int] = 2
    reads: ClassVar[tuple[str, ...]] = ("wav",)
    writes: ClassVar[tuple[str, ...]] = ("units", "timbre", "features")
    kept: ClassVar[tuple[str, ...]] = ("features", "timbre")
    _encoder: SpeechEncoder | None = None

    def gives(self) -> tuple[str, ...]:
        """All that it writes, features only where they are kept."""
        return self.writes if self.config.keep_features else super().gives()

    def on_gpu(self) -> bool:
        """Whether its network runs in torch."""
        return True

    def weights(self) -> Sequence[Path]:
        """The encoder's file."""
        return encoder_files(self.config.encoder, self.folder)

    def codebook(self) -> Sequence[Path]:
        """The centroids, where they are known."""
        return [self.config.centroids] if self.config.centroids else []

    @classmethod
    def differ_in_codebook(cls, old: Recipe, new: Recipe) -> bool:
        """Same encoder, layer and precision, and features kept in both or in neither."""
        one, other = ({k: v for k, v in r.settings.items() if k not in FITTED} for r in (old, new))
        return old != new and (old.version, old.weights, one) == (new.version, new.weights, other)

    @classmethod
    def keeps(cls, recipe: Recipe) -> bool:
        """Whether it says `keep_features`."""
        return bool(recipe.settings.get("keep_features"))

    def setup(self) -> None:
        """Load encoder and centroids.

        Raises:
            UserError: no centroids, or ones that do not fit `clusters` or the encoder; no such layer.
        """
        config = self.config
        self._load_centroids()
        self._encoder = make_encoder(config.encoder, config.layer, self.folder, config.precision)
        self._check_width(self._encoder.width)

    def setup_reuse(self) -> None:
        """Load the centroids alone.

        Raises:
            UserError: no centroids, or ones that do not fit `clusters`.
        """
        self._load_centroids()

    def process(self, items: Iterable[Item]) -> Iterator[tuple[Item, Fields | Rejection]]:
        """Each item with its fields or its rejection, in order; a batch that fails is done again clip by clip."""
        if self._encoder is None:
            return super().process(items)
        budget, waste = self._encoder.budget, self._encoder.waste
        return in_batches(items, lambda item: len(item.fields["wav"]) // HOP, budget, self._attempt_all, waste)

    def run(self, item: Item) -> Fields:
        """Units and timbre of one clip, from its sound or from its kept features."""
        import numpy as np

        if "features" in item.fields:
            return self._fields(item.fields["timbre"], item.fields["features"].astype(np.float32))
        return self._encode([item])[0]

    def _attempt_all(self, items: list[Item]) -> list[Fields | Rejection]:
        if len(items) > 1:
            try:
                return [*self._encode(items)]
            except UserError:
                raise
            except Exception:
                pass  # which clip it was, and why, comes out below
        return [self.attempt(item) for item in items]

    def _encode(self, items: Sequence[Item]) -> list[Fields]:
        assert self._encoder is not None, "an item without kept features needs setup()"
        encoded = self._encoder.encode([from_pcm(item.fields["wav"]) for item in items], self.config.layer)
        return [self._fields(timbre, features) for timbre, features in encoded]

    def _fields(self, timbre: Floats, features: Floats) -> Fields:
        import numpy as np

        from pipeline.units import assign

        self._check_width(features.shape[1])
        if not self.config.keep_features:
            return {"units": assign(features, self._centroids), "timbre": timbre}
        kept = features.astype(np.float16)
        units = assign(kept.astype(np.float32), self._centroids)
        return {"units": units, "timbre": timbre, "features": kept}

    def _load_centroids(self) -> None:
        from pipeline.units import load_codebook

        config = self.config
        if config.centroids is None:
            raise UserError("speech: no centroids; set speech.centroids to an npy file, or build a dataset to fit them")
        self._centroids = load_codebook(config.centroids)
        if len(self._centroids) != config.clusters:
            raise UserError(
                f"centroids {config.centroids}: there are {len(self._centroids)}, but speech.clusters is "
                f"{config.clusters}"
            )

    def _check_width(self, width: int) -> None:
        if self._centroids.shape[1] != width:
            raise UserError(
                f"centroids {self.config.centroids}: {self._centroids.shape[1]} channels, but the features of "
                f"{self.config.encoder} have {width}"
            )

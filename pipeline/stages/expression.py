"""Facial expression: normalised landmark geometry, or the features of a network trained on expressions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pipeline.networks.device import Precision, pick_device
from pipeline.stage import Fields, Item, Stage
from shards.config import Config

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pipeline.networks.swin import ExpressionNetwork

INNER = slice(17, 68)
"""Brows, nose, eyes and mouth; the jaw line says more about pose than about expression."""


class ExpressionConfig(Config):
    """Facial expression.

    Attributes:
        network: `geometry` (102 numbers, no network) or `swin`, the Swin-T for RAF-DB (768).
        precision: of the Swin-T's encoder.
    """

    network: Literal["geometry", "swin"] = "geometry"
    precision: Precision = "float32"


class Expression(Stage[ExpressionConfig]):
    """Reads `landmarks` and `face`, writes `expression` of every frame, float16 [F, 102 or 768]."""

    name: ClassVar[str] = "expression"
    version: ClassVar[int] = 1
    reads: ClassVar[tuple[str, ...]] = ("landmarks", "face")
    writes: ClassVar[tuple[str, ...]] = ("expression",)
    _network: ExpressionNetwork

    def on_gpu(self) -> bool:
        """Whether its network runs in torch."""
        return self.config.network == "swin"

    def weights(self) -> Sequence[Path]:
        """The network's file, where there is one."""
        if self.config.network == "geometry":
            return []
        from pipeline.networks.swin import CHECKPOINT
        from pipeline.networks.weights import find_checkpoint

        return [find_checkpoint(CHECKPOINT, self.folder)]

    def uses(self) -> tuple[str, ...]:
        """The face for a network, the landmarks for their geometry."""
        return ("face",) if self.config.network == "swin" else ("landmarks",)

    def setup(self) -> None:
        """Load the network."""
        if self.config.network == "swin":
            from pipeline.networks.swin import ExpressionNetwork

            self._network = ExpressionNetwork(self.weights()[0], pick_device(), self.config.precision)

    def run(self, item: Item) -> Fields:
        """Expression features of one clip."""
        import numpy as np

        if self.config.network == "swin":
            features: NDArray[np.floating] = self._network.features(item.fields["face"])
        else:
            features = geometry(item.fields["landmarks"])
        return {"expression": features.astype(np.float16)}


def geometry(landmarks: NDArray[np.floating]) -> NDArray[np.float64]:
    """The 51 inner points, smoothed, in the frame of the mean face: head position, size and tilt are gone.

    Coordinates are centred on the nose bridge's usual place and divided by the usual distance of the outer eye corners.

    Args:
        landmarks: pixels [F, 68, 2].

    Returns:
        float64 [F, 102].
    """
    import numpy as np

    from pipeline import align

    points = align.smooth(landmarks.astype(np.float64))
    origin, scale = align.CANONICAL[0], align.CANONICAL[5, 0] - align.CANONICAL[2, 0]
    features = np.empty((len(points), 102))
    for number, face in enumerate(points):
        matrix = align.similarity(face[list(align.STABLE)], align.CANONICAL)
        features[number] = ((align.transform(matrix, face[INNER]) - origin) / scale).ravel()
    return features

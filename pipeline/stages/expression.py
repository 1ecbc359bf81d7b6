"""Facial expression as normalised landmark geometry."""

from __future__ import annotations

from typing import ClassVar

from pipeline.stage import Fields, Item, Stage
from shards.config import Config

INNER = slice(17, 68)
"""Brows, nose, eyes and mouth; the jaw line says more about pose than about expression."""


class ExpressionConfig(Config):
    """No settings."""


class Expression(Stage[ExpressionConfig]):
    """Reads `landmarks`, writes `expression`, float16 [F, 102].

    The 51 inner points, smoothed, in the frame of the mean face: head position, size and tilt are gone. Coordinates are
    centred on the nose bridge's usual place and divided by the usual distance of the outer eye corners.
    """

    name: ClassVar[str] = "expression"
    version: ClassVar[int] = 1
    reads: ClassVar[tuple[str, ...]] = ("landmarks",)
    writes: ClassVar[tuple[str, ...]] = ("expression",)

    def run(self, item: Item) -> Fields:
        """Expression features of one clip."""
        import numpy as np

        from pipeline import align

        points = align.smooth(item.fields["landmarks"].astype(np.float64))
        origin, scale = align.CANONICAL[0], align.CANONICAL[5, 0] - align.CANONICAL[2, 0]
        features = np.empty((len(points), 102))
        for number, face in enumerate(points):
            matrix = align.similarity(face[list(align.STABLE)], align.CANONICAL)
            features[number] = ((align.transform(matrix, face[INNER]) - origin) / scale).ravel()
        return {"expression": features.astype(np.float16)}

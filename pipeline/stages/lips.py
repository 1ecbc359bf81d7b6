"""Mouth regions, by the recipe of auto_avsr (Ma et al. 2023)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from pipeline.stage import Fields, Item, Reason, Reject, Stage
from shards.config import Config
from shards.schema import LIP_SIZE

HALF = LIP_SIZE // 2


class LipsConfig(Config):
    """`max_bias`: pixels by which the mouth may lie outside the box that the canonical frame allows."""

    max_bias: int = Field(5, ge=0)


class Lips(Stage[LipsConfig]):
    """Reads `landmarks` and the media, writes `lips`, uint8 [F, 96, 96] grey.

    Points are smoothed, a similarity brings the stable ones to the mean face, and the box is cut about the mouth's
    centre. Clips shorter than the smoothing window, which auto_avsr drops, are kept.
    """

    name: ClassVar[str] = "lips"
    version: ClassVar[int] = 1
    reads: ClassVar[tuple[str, ...]] = ("landmarks",)
    writes: ClassVar[tuple[str, ...]] = ("lips",)
    media: ClassVar[bool] = True

    def run(self, item: Item) -> Fields:
        """Mouth regions of one clip.

        Raises:
            Reject: LIPS_OUTSIDE, or what decoding finds.
        """
        import cv2
        import numpy as np

        from pipeline import align
        from pipeline.media import decode_video

        clip = item.clip
        points = align.smooth(item.fields["landmarks"].astype(np.float64))
        crops = np.zeros((len(points), LIP_SIZE, LIP_SIZE), np.uint8)
        frames = decode_video(clip.uri, clip.start, clip.end)
        for number, (frame, face) in enumerate(zip(frames, points, strict=True)):
            matrix = align.robust_similarity(face[list(align.STABLE)], align.CANONICAL)
            if matrix is None:
                raise Reject(Reason.LIPS_OUTSIDE, f"{clip.uri}: frame {number}: the landmarks fit no face")
            centre = align.transform(matrix, face)[align.MOUTH].mean(axis=0)
            if np.abs(centre - align.CANONICAL_SIZE / 2).max() > HALF + self.config.max_bias:
                where = f"({centre[0]:.0f}, {centre[1]:.0f}) of the aligned face"
                raise Reject(Reason.LIPS_OUTSIDE, f"{clip.uri}: frame {number}: the mouth lies at {where}")
            left, top = np.round(np.clip(centre - HALF, 0, align.CANONICAL_SIZE - LIP_SIZE)).astype(int)
            aligned = align.warp(frame, matrix, align.CANONICAL_SIZE)
            crop = aligned[top : top + LIP_SIZE, left : left + LIP_SIZE]
            crops[number] = cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY)
        return {"lips": crops}

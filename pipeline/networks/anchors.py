"""What all RetinaFace backends share: resizing, anchors, decoding and suppression (Deng et al. 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import cv2
import numpy as np

STRIDES = (8, 16, 32)
SIDES = ((16, 32), (64, 128), (256, 512))
"""Anchor sides in pixels for each stride."""
VARIANCES = (0.1, 0.2)
"""Scales of the regressed centres and sizes, as in SSD."""


@dataclass(frozen=True)
class Faces:
    """Faces of one frame, best first.

    Attributes:
        boxes: float32 [n, 4], x0, y0, x1, y1 in pixels.
        scores: float32 [n].
        points: float32 [n, 5, 2]: eye centres, nose tip, mouth corners, left of the image first.
    """

    boxes: np.ndarray
    scores: np.ndarray
    points: np.ndarray


@dataclass(frozen=True)
class Survivors:
    """Anchors of a batch whose score passed the threshold, in any order.

    Attributes:
        frames, anchors: int64 [m], frame in the batch and number of the anchor.
        scores: float32 [m].
        offsets: float32 [m, 4], regressed boxes.
        points: float32 [m, 10], regressed landmarks.
    """

    frames: np.ndarray
    anchors: np.ndarray
    scores: np.ndarray
    offsets: np.ndarray
    points: np.ndarray


def shrink(frames: Sequence[np.ndarray], long_side: int) -> np.ndarray:
    """Frames of one size as uint8 [B, h, w, 3], scaled down where they are larger than `long_side`; never up."""
    height, width = frames[0].shape[:2]
    scale = min(1.0, long_side / max(height, width))
    if scale == 1:
        return np.stack(frames)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.stack([cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in frames])


@lru_cache(maxsize=8)
def anchor_boxes(width: int, height: int) -> np.ndarray:
    """Anchors of an image: float32 [n, 4], centre x, centre y, width, height in pixels, in the network's order.

    Feature maps have ceil(side / stride) cells, as the padded convolutions give them; the order is stride, row, column,
    side.
    """
    levels = []
    for stride, sides in zip(STRIDES, SIDES, strict=True):
        y, x, side = np.meshgrid(
            (np.arange(-(-height // stride)) + 0.5) * stride,
            (np.arange(-(-width // stride)) + 0.5) * stride,
            np.array(sides, np.float64),
            indexing="ij",
        )
        levels.append(np.stack([x, y, side, side], axis=-1).reshape(-1, 4))
    anchors = np.concatenate(levels).astype(np.float32)
    anchors.setflags(write=False)
    return anchors


def decode_boxes(offsets: np.ndarray, anchors: np.ndarray) -> np.ndarray:
    """Corners x0, y0, x1, y1 from regressed offsets and anchors, both [n, 4]."""
    centres = anchors[:, :2] + VARIANCES[0] * offsets[:, :2] * anchors[:, 2:]
    halves = anchors[:, 2:] * np.exp(VARIANCES[1] * offsets[:, 2:]) / 2
    return np.concatenate([centres - halves, centres + halves], axis=1)


def overlaps(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Intersection over union of one box [4], or of one per row [n, 4], with the boxes [n, 4]."""
    sides = np.minimum(box[..., 2:], boxes[:, 2:]) - np.maximum(box[..., :2], boxes[:, :2])
    common = np.clip(sides, 0, None).prod(axis=1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    return common / np.maximum((box[..., 2:] - box[..., :2]).prod(axis=-1) + areas - common, 1e-9)


def suppress(boxes: np.ndarray, limit: float, frames: np.ndarray | None = None) -> np.ndarray:
    """Indices of boxes that no kept better one of their frame overlaps by more than `limit`.

    All frames advance together: each round keeps the best box left of every frame.

    Args:
        boxes: [m, 4], best first within each frame.
        frames: [m], frame of each box, ascending; None for a single frame.
    """
    frames = np.zeros(len(boxes), np.int64) if frames is None else frames
    left = np.arange(len(boxes))
    kept = []
    while len(left):
        first = np.diff(frames[left], prepend=-1) > 0
        best = left[first]
        kept.append(best)
        rivals = best[np.cumsum(first) - 1][~first]
        left = left[~first]
        left = left[overlaps(boxes[rivals], boxes[left]) <= limit]
    return np.sort(np.concatenate(kept)) if kept else left


def decode(found: Survivors, batch: tuple[int, ...], frame: tuple[int, ...], overlap: float) -> list[Faces]:
    """Faces of each frame of a batch.

    Args:
        batch: shape of what the network was fed as images, B, h, w, ...
        frame: shape of the frames before scaling, H, W, ...
        overlap: suppression limit.
    """
    order = np.lexsort((found.anchors, -found.scores, found.frames))
    frames, scores = found.frames[order], found.scores[order]
    anchors = anchor_boxes(batch[2], batch[1])[found.anchors[order]]
    boxes = decode_boxes(found.offsets[order], anchors)
    points = anchors[:, None, :2] + VARIANCES[0] * found.points[order].reshape(-1, 5, 2) * anchors[:, None, 2:]
    # Scaled sides are rounded, so each axis has its own factor back.
    factor = np.array([frame[1] / batch[2], frame[0] / batch[1]], np.float32)
    kept = suppress(boxes, overlap, frames)
    boxes, scores, points = boxes[kept] * np.tile(factor, 2), scores[kept], points[kept] * factor
    ends = np.searchsorted(frames[kept], np.arange(batch[0] + 1))
    return [Faces(boxes[start:end], scores[start:end], points[start:end]) for start, end in pairwise(ends)]

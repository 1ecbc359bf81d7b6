"""Faces in a common frame: filling gaps, smoothing, similarity transforms, and the templates that they aim at."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

STABLE = (28, 33, 36, 39, 42, 45, 48, 54)
"""iBUG points that carry auto_avsr's alignment: nose, eye corners, mouth corners."""
MOUTH = slice(48, 68)
CANONICAL = np.array(
    [
        (128.49, 106.92),
        (128.87, 137.30),
        (92.52, 94.37),
        (112.77, 94.94),
        (145.53, 94.53),
        (166.68, 93.57),
        (107.17, 157.20),
        (152.19, 156.99),
    ]
)
"""Where auto_avsr's mean face has the stable points, in its frame of 256x256 pixels (x, y)."""
CANONICAL_SIZE = 256
ARCFACE = np.array([(38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041)])
"""Eye centres, nose tip and mouth corners in insightface's face crop of 112x112 pixels."""
WINDOW = 12
"""Frames of the smoothing window, as in auto_avsr."""


def fill_gaps(values: Sequence[np.ndarray | None]) -> np.ndarray:
    """Points of every frame from points of some: linear in time between two frames, the nearest beyond the ends.

    Args:
        values: one array per frame, None where the frame has none; at least one array.

    Returns:
        float64 [F, ...].
    """
    known = [frame for frame, value in enumerate(values) if value is not None]
    stacked = np.stack([np.asarray(values[frame], np.float64) for frame in known])
    flat = stacked.reshape(len(known), -1)
    frames = np.arange(len(values))
    filled = np.stack([np.interp(frames, known, column) for column in flat.T], axis=1)
    return filled.reshape(len(values), *stacked.shape[1:])


def smooth(points: np.ndarray, window: int = WINDOW) -> np.ndarray:
    """Average each frame's points over a symmetric window that shrinks to one frame at both ends.

    Shape is smoothed, position is not: the average moves so that its centroid is the frame's own.

    Args:
        points: [F, P, 2].
    """
    count = len(points)
    sums = np.concatenate([np.zeros((1, *points.shape[1:])), np.cumsum(points, axis=0, dtype=np.float64)])
    frames = np.arange(count)
    margin = np.minimum(window // 2, np.minimum(frames, count - 1 - frames))
    mean = (sums[frames + margin + 1] - sums[frames - margin]) / (2 * margin + 1)[:, None, None]
    return mean + (points.mean(axis=1) - mean.mean(axis=1))[:, None]


def robust_similarity(source: np.ndarray, target: np.ndarray) -> np.ndarray | None:
    """2x3 matrix of scale, rotation and shift from `source` to `target` [P, 2] by least median of squares, or None.

    The search draws random subsets; it starts from the same seed each time, so a frame's result is its own.
    """
    cv2.setRNGSeed(0)
    matrix, _ = cv2.estimateAffinePartial2D(source.astype(np.float64), target.astype(np.float64), method=cv2.LMEDS)
    return matrix


def similarity(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """2x3 matrix of scale, rotation and shift that takes `source` nearest to `target` [P, 2] in the least-squares sense
    (Umeyama 1991, without reflection)."""
    from_mean, to_mean = source.mean(axis=0), target.mean(axis=0)
    a, b = source - from_mean, target - to_mean
    norm = (a**2).sum()
    cosine = (a * b).sum() / norm
    sine = (a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]).sum() / norm
    turn = np.array([[cosine, -sine], [sine, cosine]])
    return np.concatenate([turn, (to_mean - turn @ from_mean)[:, None]], axis=1)


def transform(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Apply a 2x3 matrix to points [P, 2]."""
    return points @ matrix[:, :2].T + matrix[:, 2]


def warp(image: np.ndarray, matrix: np.ndarray, size: int) -> np.ndarray:
    """Image under a 2x3 matrix, `size` x `size`, bilinear, zero beyond the source."""
    return cv2.warpAffine(image, matrix, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)

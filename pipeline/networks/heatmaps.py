"""Crops in front of a FAN and the reading of the heat maps behind it, by the rules of the two public releases.

A crop is a square window of whole pixels, zero beyond the frame, scaled to 256; heat maps have 64 cells a side.
"""

from __future__ import annotations

import cv2
import numpy as np
import torch
from torch import Tensor

SIZE, CELLS = 256, 64
RAISE = 0.12
"""face-alignment moves the box's centre up by this share of its height."""
NOMINAL, REFERENCE = 200.0, 165
"""face-alignment's crop is `NOMINAL` (width + height) / `REFERENCE` pixels wide. 165 is its divisor for RetinaFace
boxes, which are tighter than those of its default detector (195)."""
RATIO = 0.55
"""ibug's crop is the mean of the box's sides divided by this."""
RADIUS = 0.1
"""ibug takes the centroid of the cells within this share of a heat map's side around the peak."""
MIRRORED = np.array(
    [
        *(*range(16, -1, -1), *range(26, 16, -1)),  # jaw, brows
        *(27, 28, 29, 30, *range(35, 30, -1)),  # nose
        *(45, 44, 43, 42, 47, 46, 39, 38, 37, 36, 41, 40),  # eyes
        *(*range(54, 47, -1), *range(59, 54, -1), *range(64, 59, -1), 67, 66, 65),  # mouth
    ]
)
"""The iBUG point that each one is in a mirror."""


def windows(boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centres [n, 2] and sides [n] of face-alignment's crops around boxes [n, 4]; float64."""
    x0, y0, x1, y1 = np.asarray(boxes, np.float64).T
    centres = np.stack([x1 - (x1 - x0) / 2, y1 - (y1 - y0) / 2 - (y1 - y0) * RAISE], axis=1)
    return centres, NOMINAL * ((x1 - x0 + y1 - y0) / REFERENCE)


def raised_boxes(boxes: np.ndarray) -> np.ndarray:
    """face-alignment's crops: int [n, 4], x0, y0, x1, y1, the last ones exclusive.

    They are the crop's pixels (1, 1) and (256, 256) mapped back, by the inverse of a float32 matrix as there, and cut
    to whole numbers towards zero.
    """
    centres, sides = windows(boxes)
    inverse = 1 / (SIZE / sides).astype(np.float32)[:, None]
    shift = -(SIZE * (-centres / sides[:, None] + 0.5)).astype(np.float32) * inverse
    return np.concatenate([inverse * np.float32(pixel) + shift for pixel in (1, SIZE)], axis=1).astype(np.int32)


def center_boxes(boxes: np.ndarray) -> np.ndarray:
    """ibug's crops: int [n, 4], x0, y0, x1, y1, the last ones exclusive."""
    boxes = np.asarray(boxes, np.float32)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    sides = ((boxes[:, 2:] - boxes[:, :2]).mean(axis=1) / RATIO)[:, None]
    low = np.round(centres - sides / 2)
    return np.concatenate([low, np.round(low + sides) + 1], axis=1).astype(np.int32)


def cut(frame: np.ndarray, box: np.ndarray) -> np.ndarray:
    """The window x0, y0, x1, y1 of a frame uint8 [H, W, 3], zero beyond it, bilinear at 256x256."""
    x0, y0, x1, y1 = (int(side) for side in box)
    height, width = frame.shape[:2]
    left, top, right, bottom = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
    if (left, top, right, bottom) == (x0, y0, x1, y1):
        window = frame[y0:y1, x0:x1]
    else:
        window = np.zeros((max(y1 - y0, 1), max(x1 - x0, 1), 3), np.uint8)
        if left < right and top < bottom:
            window[top - y0 : bottom - y0, left - x0 : right - x0] = frame[top:bottom, left:right]
    return cv2.resize(window, (SIZE, SIZE), interpolation=cv2.INTER_LINEAR)


def flip_maps(maps: Tensor) -> Tensor:
    """Heat maps [n, 68, 64, 64] of mirrored crops as those of the crops themselves."""
    return maps[:, torch.from_numpy(MIRRORED).to(maps.device)].flip(3)


def decode_peaks(maps: Tensor, boxes: np.ndarray) -> np.ndarray:
    """face-alignment's points: the highest cell (the first of equals), a quarter of a cell towards its higher neighbour
    along each axis where it has neighbours on all sides, mapped to the frame and cut to whole pixels.

    Args:
        maps: [n, 68, 64, 64].
        boxes: the faces' boxes [n, 4].

    Returns:
        float32 [n, 68, 2].
    """
    flat = maps.flatten(2)
    peak = flat.argmax(dim=2)
    x, y = peak % CELLS, peak // CELLS
    inner = (x > 0) & (x < CELLS - 1) & (y > 0) & (y < CELLS - 1)
    safe = torch.where(inner, peak, CELLS + 1)

    def slope(step: int) -> Tensor:
        rise = flat.gather(2, (safe + step)[..., None]) - flat.gather(2, (safe - step)[..., None])
        return torch.where(inner, rise[..., 0].sign(), 0)

    cells = torch.stack([x + slope(1) / 4, y + slope(CELLS) / 4], dim=2).cpu().numpy().astype(np.float64) + 0.5
    centres, sides = (part.astype(np.float64) for part in windows(boxes))
    found = centres[:, None] + (cells / CELLS - 0.5) * sides[:, None, None]
    return np.trunc(found).astype(np.float32)


def decode_centroids(maps: Tensor, corners: np.ndarray) -> np.ndarray:
    """ibug's points: the centroid of the positive cells within 6.4 cells of the peak, mapped to the frame.

    Args:
        maps: [n, 68, 64, 64].
        corners: the crops [n, 4] that `center_boxes` gave.

    Returns:
        float32 [n, 68, 2].
    """
    peak = maps.flatten(2).argmax(dim=2)[..., None]
    grid = torch.arange(CELLS, device=maps.device)
    far_x, far_y = grid - peak % CELLS, grid - peak // CELLS
    near = far_x[:, :, None] ** 2 + far_y[..., None] ** 2 <= (RADIUS * CELLS) ** 2
    mass = maps.clamp(min=0) * near
    total = mass.sum(dim=(2, 3)).clamp(min=torch.finfo(maps.dtype).eps)
    middle = grid + 0.5
    x = (mass.sum(dim=2) * middle).sum(dim=2) / total
    y = (mass.sum(dim=3) * middle).sum(dim=2) / total
    cells = torch.stack([x, y], dim=2).cpu().numpy()
    low, high = corners[:, None, :2], corners[:, None, 2:]
    return (cells * (high - low) / CELLS + low).astype(np.float32)

"""What the networks that look at aligned face crops share: scaling, batches, and where and how they compute."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shards.schema import FACE_SIZE

BATCH = {"cpu": 8, "cuda": 256}
"""Crops per call: more than 8 gain nothing on a processor, and the Swin-T slows down; a GPU wants many."""


@torch.inference_mode()
def apply_to_crops(
    network: Callable[[Tensor], Tensor], faces: NDArray[np.uint8], device: torch.device, dtype: torch.dtype
) -> NDArray[np.float32]:
    """Run a network over face crops, a batch at a time.

    Args:
        network: takes `dtype` [n, 3, 112, 112] in [-1, 1] (channels last in memory), gives [n, D].
        faces: RGB [n, 112, 112, 3], n at least 1.

    Returns:
        float32 [n, D].

    Raises:
        ValueError: crops of another shape or type, or none.
    """
    if faces.dtype != np.uint8 or faces.shape[1:] != (FACE_SIZE, FACE_SIZE, 3) or not len(faces):
        raise ValueError(f"expected uint8 crops [n, {FACE_SIZE}, {FACE_SIZE}, 3], got {faces.dtype} {faces.shape}")
    parts = []
    for chunk in np.array_split(faces, -(-len(faces) // BATCH[device.type])):
        # Frames lie in memory as [n, H, W, 3]: seen as [n, 3, H, W] they are channels last already.
        pixels = torch.from_numpy(np.ascontiguousarray(chunk)).to(device).permute(0, 3, 1, 2)
        parts.append(network((pixels.float() / 127.5 - 1).to(dtype)).float().cpu())
    return torch.cat(parts).numpy()

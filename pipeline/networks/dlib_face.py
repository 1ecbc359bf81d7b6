"""dlib's 68-point predictor and its 128-number face network, with the files that `face_recognition_models` carries."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.errors import UserError

BOX_SIDE = 2.0
"""Side of the square handed to the predictor, in units of the distance between the middles of eyes and mouth.

The predictor was trained on boxes of dlib's HOG detector. On real clips these measure 2.08 +- 0.23 of that distance and
sit on the midpoint between eyes and mouth (off by 0.02 of it). Squares of 1.8 to 2.1 about that midpoint gave the
smallest disagreement with RetinaFace's five points (0.056 of the eye distance), less than squares from its boxes."""
CHIP_SIZE = 150
_CHIP = np.array([[1.457, 0.0, -6.6], [0.0, 1.457, -28.8]])
"""From the 112-pixel crop to the network's 150-pixel chip (padding 0.25): least squares between the insightface
template and the mean position of the five points in dlib's own chips of 44 real faces; 1.4 pixels off on average."""


def model_file(name: str) -> Path:
    """A data file of `face_recognition_models`, found without importing that package (it wants `pkg_resources`).

    Raises:
        UserError: the package is not installed.
    """
    spec = importlib.util.find_spec("face_recognition_models")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    path = Path(folders[0], "models", name) if folders else None
    if path is None or not path.is_file():
        raise UserError(f"{name}: needs the package face_recognition_models; pip install 'faces2voices[pipeline]'")
    return path


def landmarks_file() -> Path:
    return model_file("shape_predictor_68_face_landmarks.dat")


def identity_file() -> Path:
    return model_file("dlib_face_recognition_resnet_model_v1.dat")


class LandmarkPredictor:
    """68 iBUG points by an ensemble of regression trees (Kazemi and Sullivan 2014)."""

    def __init__(self) -> None:
        import dlib

        self._dlib = dlib
        self._predict = dlib.shape_predictor(str(landmarks_file()))

    def points(self, frame: np.ndarray, five: np.ndarray) -> np.ndarray:
        """Points of one face: float32 [68, 2] in pixels of the frame.

        Args:
            frame: RGB uint8 [H, W, 3].
            five: eye centres, nose tip and mouth corners, [5, 2].
        """
        eyes, mouth = five[:2].mean(axis=0), five[3:].mean(axis=0)
        half = BOX_SIDE / 2 * max(float(np.linalg.norm(eyes - mouth)), 1.0)
        x, y = (eyes + mouth) / 2
        box = self._dlib.rectangle(*(round(float(side)) for side in (x - half, y - half, x + half, y + half)))
        shape = self._predict(np.ascontiguousarray(frame), box)
        return np.array([(shape.part(i).x, shape.part(i).y) for i in range(68)], np.float32)


class IdentityNetwork:
    """dlib's ResNet-29 face descriptor."""

    def __init__(self) -> None:
        import dlib

        self._network = dlib.face_recognition_model_v1(str(identity_file()))

    def embed(self, faces: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Embeddings of aligned RGB crops [n, 112, 112, 3]: float32 [n, 128], unit length."""
        from pipeline.align import warp

        chips = [np.ascontiguousarray(warp(face, _CHIP, CHIP_SIZE)) for face in faces]
        vectors = [np.array(self._network.compute_face_descriptor(chip), np.float32) for chip in chips]
        return np.stack([vector / np.linalg.norm(vector) for vector in vectors])

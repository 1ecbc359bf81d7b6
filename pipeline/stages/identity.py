"""Face identity embedding."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

import numpy as np
from pydantic import Field

from pipeline.networks.device import Precision, pick_device
from pipeline.stage import Fields, Item, Stage
from shards.config import Config

if TYPE_CHECKING:
    from numpy.typing import NDArray


class IdentityConfig(Config):
    """Face identity.

    Attributes:
        network: `dlib` (128 numbers), or ArcFace's `iresnet50` or `iresnet100` (512).
        every: frames from one embedding to the next; identity is static, and the networks are slow.
        precision: of the ArcFace networks' convolutions.
    """

    network: Literal["dlib", "iresnet50", "iresnet100"] = "dlib"
    every: int = Field(25, ge=1)
    precision: Precision = "float32"


class FaceNetwork(Protocol):
    """RGB crops uint8 [n, 112, 112, 3] -> float32 [n, D], unit length."""

    def embed(self, faces: NDArray[np.uint8]) -> NDArray[np.float32]: ...


class Identity(Stage[IdentityConfig]):
    """Reads `face`, writes `identity`, float16 [F, 128 or 512], unit length.

    Embedded every so many frames and at the last one, linear in between, normalised again.
    """

    name: ClassVar[str] = "identity"
    version: ClassVar[int] = 1
    reads: ClassVar[tuple[str, ...]] = ("face",)
    writes: ClassVar[tuple[str, ...]] = ("identity",)
    _network: FaceNetwork

    @property
    def _layers(self) -> int:
        """Of the ArcFace network."""
        return int(self.config.network.removeprefix("iresnet"))

    def on_gpu(self) -> bool:
        """Whether its network runs in torch."""
        return self.config.network != "dlib"

    def weights(self) -> Sequence[Path]:
        """The network's file."""
        if self.config.network == "dlib":
            from pipeline.networks.dlib_face import identity_file

            return [identity_file()]
        from pipeline.networks.iresnet import CHECKPOINTS
        from pipeline.networks.weights import find_checkpoint

        return [find_checkpoint(CHECKPOINTS[self._layers], self.folder)]

    def setup(self) -> None:
        """Load the network."""
        if self.config.network == "dlib":
            from pipeline.networks.dlib_face import IdentityNetwork

            self._network = IdentityNetwork()
        else:
            from pipeline.networks.iresnet import ArcFace

            self._network = ArcFace(self.weights()[0], self._layers, pick_device(), self.config.precision)

    def run(self, item: Item) -> Fields:
        """Embeddings of one clip."""
        from pipeline.align import fill_gaps

        faces = item.fields["face"]
        chosen = sorted({*range(0, len(faces), self.config.every), len(faces) - 1})
        known = dict(zip(chosen, self._network.embed(faces[chosen]), strict=True))
        vectors = fill_gaps([known.get(number) for number in range(len(faces))])
        return {"identity": (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)}

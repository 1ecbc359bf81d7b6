"""Face identity embedding."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from pydantic import Field

from pipeline.stage import Fields, Item, Stage
from shards.config import Config


class IdentityConfig(Config):
    """`every`: frames from one embedding to the next; identity is static, and the network is slow."""

    every: int = Field(25, ge=1)


class Identity(Stage[IdentityConfig]):
    """Reads `face`, writes `identity`, float16 [F, 128], unit length.

    Embedded every so many frames and at the last one, linear in between, normalised again.
    """

    name: ClassVar[str] = "identity"
    version: ClassVar[int] = 1
    reads: ClassVar[tuple[str, ...]] = ("face",)
    writes: ClassVar[tuple[str, ...]] = ("identity",)

    def weights(self) -> Sequence[Path]:
        """The network's file."""
        from pipeline.networks.dlib_face import identity_file

        return [identity_file()]

    def setup(self) -> None:
        """Load the network."""
        from pipeline.networks.dlib_face import IdentityNetwork

        self._network = IdentityNetwork()

    def run(self, item: Item) -> Fields:
        """Embeddings of one clip."""
        from pipeline.align import fill_gaps

        faces = item.fields["face"]
        chosen = {*range(0, len(faces), self.config.every), len(faces) - 1}
        vectors = fill_gaps([self._network.embed(face) if n in chosen else None for n, face in enumerate(faces)])
        return {"identity": (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)}

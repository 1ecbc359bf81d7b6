"""Energy: the norm of each mel frame."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.stage import Fields, Item, Stage
from shards.config import Config

EnergyKind = Literal["log_norm", "norm", "norm_of_log", "standardised"]


class EnergyConfig(Config):
    """Which norm; |.| is the L2 norm over mel bins and M the amplitude exp(log-mel).

    Attributes:
        kind: `log_norm` is ln|M|, well scaled as it is and the same for any filterbank up to a constant; `norm` is
            |M|; `norm_of_log` is |ln M|; `standardised` is |M| with zero mean and unit variance over the clip.
    """

    kind: EnergyKind = "log_norm"


class Energy(Stage[EnergyConfig]):
    """Reads `mel`, writes `energy`, float32 [2F]."""

    name: ClassVar[str] = "energy"
    version: ClassVar[int] = 1
    reads: ClassVar[tuple[str, ...]] = ("mel",)
    writes: ClassVar[tuple[str, ...]] = ("energy",)

    def run(self, item: Item) -> Fields:
        """Energy of one clip."""
        return {"energy": energy(item.fields["mel"], self.config.kind)}


def energy(log_mel: NDArray[np.float32], kind: EnergyKind = "log_norm") -> NDArray[np.float32]:
    """Norm of each frame of a log-mel spectrogram [T, 80]; float32 [T].

    The floor of the log-mel keeps the norm positive, so the logarithm is finite. A constant clip standardises to zeros.
    """
    mel = log_mel.astype(np.float64)
    norm = np.linalg.norm(mel if kind == "norm_of_log" else np.exp(mel), axis=1)
    if kind == "log_norm":
        norm = np.log(norm)
    elif kind == "standardised":
        norm = (norm - norm.mean()) / (norm.std() + 1e-5)
    return norm.astype(np.float32)

"""SVTS (Schoburg-Carrillo de Mira et al. 2022): a conformer reads a mel off the lips, trained on its L1 distance."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model import losses as terms
from model.baselines.baseline import Regression
from model.baselines.conformer import beside
from model.config import ModelConfig
from model.encoder import MEL_BINS
from model.flow import Place
from model.layers import length_mask
from model.system import Batch


class SVTS(Regression):
    """Conformer, the speaker's vector beside its output, two linear layers to the mel."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        dim = config.conformer.dim
        self.to_mel = nn.Sequential(nn.Linear(dim + self.speaker_dim, dim), nn.GELU(), nn.Linear(dim, MEL_BINS))

    def read(self, batch: Batch, timbre: Tensor | None = None) -> dict[str, Tensor]:
        """See `System.predict`: mu, and with `speaker: voice` the timbre that was given."""
        hidden, _ = self.hidden(batch)
        mu = self.to_mel(beside(hidden, self.speaker(batch, timbre))).transpose(1, 2)
        return {"mu": mu.float(), **self.given_voice(batch, timbre)}

    def losses(
        self, batch: Batch, generator: torch.Generator, place: Place | None = None, share: float | Tensor = 1.0
    ) -> dict[str, Tensor]:
        """See `System.losses`; the one part is mel."""
        mask = length_mask(2 * batch["frames"], batch["mel"].shape[2])
        mel = self.standardised(batch["mel"], mask)
        parts = {"mel": terms.mel_loss(self.read(batch)["mu"], mel, mask) * share}
        return {"loss": terms.total_loss(parts, self.config.loss), **parts}

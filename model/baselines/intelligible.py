"""Intelligible lip-to-speech with speech units (Choi et al. 2023): one conformer with two targets, mel and units.

Both are meant for a vocoder that reads the mel, the units and the speaker together.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model import losses as terms
from model.baselines.baseline import Regression
from model.baselines.conformer import beside
from model.config import ModelConfig
from model.encoder import MEL_BINS
from model.flow import Place
from model.layers import TimeConv, length_mask
from model.system import Batch

CONVOLUTIONS = 3


class Intelligible(Regression):
    """Conformer; a linear layer to the units, and three convolutions over it and the speaker's vector to the mel."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        dim = config.conformer.dim
        self.to_units = nn.Linear(dim, config.units)
        widths = [dim + self.speaker_dim] + [dim] * (CONVOLUTIONS - 1)
        self.convolutions = nn.ModuleList(TimeConv(width, dim, 3) for width in widths)
        self.dropout = nn.Dropout(config.conformer.dropout)
        self.to_mel = nn.Linear(dim, MEL_BINS)

    def read(self, batch: Batch, timbre: Tensor | None = None) -> dict[str, Tensor]:
        """See `System.predict`: mu, logits, and with `speaker: voice` the timbre that was given."""
        hidden, mask = self.hidden(batch)
        x = beside(hidden, self.speaker(batch, timbre))
        for convolution in self.convolutions:
            x = F.gelu(self.dropout(convolution(x, mask)))
        mu = self.to_mel(x).transpose(1, 2)
        logits = self.to_units(self.dropout(hidden))
        return {"mu": mu.float(), "logits": logits.float(), **self.given_voice(batch, timbre)}

    def losses(
        self, batch: Batch, generator: torch.Generator, place: Place | None = None, share: float | Tensor = 1.0
    ) -> dict[str, Tensor]:
        """See `System.losses`; the parts are mel and content."""
        mask = length_mask(2 * batch["frames"], batch["mel"].shape[2])
        mel, units = self.standardised(batch["mel"], mask), batch["units"]
        found = self.read(batch)
        smoothing = self.config.loss.label_smoothing
        parts = {
            "mel": terms.mel_loss(found["mu"], mel, mask) * share,
            "content": terms.content_loss(found["logits"], units, mask, smoothing) * share,
        }
        accuracy = terms.unit_accuracy(found["logits"].detach(), units, mask) * share
        return {"loss": terms.total_loss(parts, self.config.loss), **parts, "unit_accuracy": accuracy}

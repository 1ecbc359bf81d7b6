"""What the baselines share: lips through a conformer at the acoustic rate, and a vector that says who speaks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from model.baselines.conformer import Conformer
from model.config import ModelConfig
from model.layers import Up2, length_mask, mean_over_time
from model.system import Batch, Generators, System
from shards.errors import UserError


class Baseline(System):
    """Lip encoder, up-sampling and conformer, and the speaker's vector.

    The vector is the mean of the identity features over the clip, or, with `speaker: voice`, the timbre of a reference
    voice, which the batch must then hold, in synthesis too. Both pass a LayerNorm without parameters, since their
    scales differ.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.speaker_dim = config.identity_dim if config.speaker == "face" else config.timbre_dim
        self.up = Up2(config.lip_encoder.dim, config.conformer.dim, config.encoder.up_kernel, config.encoder.up_conv)
        self.conformer = Conformer(config.conformer)

    def hidden(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What is seen, [B, T, conformer.dim], and the mask [B, T]."""
        mask = length_mask(batch["frames"], batch["lips"].shape[2])
        seen = self.up(self.lip_encoder(batch["lips"], mask), mask)
        mask = mask.repeat_interleave(2, dim=1)
        return self.conformer(seen, mask), mask

    @abstractmethod
    def read(self, batch: Batch, timbre: Tensor | None = None) -> dict[str, Tensor]:
        """As `predict`, with gradient."""

    @torch.no_grad()
    def predict(self, batch: Batch, timbre: Tensor | None = None) -> dict[str, Tensor]:
        """See `System.predict`. Raises UserError: `speaker: voice`, and no timbre is given."""
        return self.read(batch, timbre)

    def speaker(self, batch: Batch, timbre: Tensor | None = None) -> Tensor:
        """The speaker's vector float32 [B, speaker_dim]. Raises UserError: see `voice`."""
        if self.config.speaker == "face":
            vector = mean_over_time(batch["identity"], length_mask(batch["frames"], batch["identity"].shape[1]))
        else:
            vector = self.voice(batch, timbre)
        return F.layer_norm(vector.float(), (self.speaker_dim,))

    def voice(self, batch: Batch, timbre: Tensor | None) -> Tensor:
        """The reference voice [B, timbre_dim]: `timbre`, or that of the batch. Raises UserError: there is neither."""
        if timbre is not None:
            return timbre
        if "timbre" not in batch:
            raise UserError(
                f"this {self.config.system} takes its speaker from a reference voice (model.speaker=voice) and was "
                "given none; give the timbre of a voice, or train one that reads it from the face (model.speaker=face)"
            )
        return batch["timbre"]

    def given_voice(self, batch: Batch, timbre: Tensor | None) -> dict[str, Tensor]:
        """`timbre` of the prediction where it was given, for a vocoder that reads it; else nothing."""
        return {"timbre": self.voice(batch, timbre).float()} if self.config.speaker == "voice" else {}


class Regression(Baseline):
    """Baselines whose prediction is the mel: rendering draws nothing."""

    def render(
        self,
        prediction: Mapping[str, Tensor],
        mask: Tensor,
        generator: Generators,
        steps: int = 10,
        guidance: float = 0.7,
        temperature: float = 1.0,
    ) -> Tensor:
        """See `System.render`."""
        return self.log_mel(prediction["mu"], mask)

"""What a video-to-speech system is to the training loop, to validation and to synthesis."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from model.avhubert import LipEncoder
from model.config import ModelConfig
from model.flow import Place
from model.layers import length_mask

Batch = Mapping[str, Tensor]
Generators = torch.Generator | Sequence[torch.Generator]


class System(nn.Module):
    """Lips, and what else of a face it reads, in; log-mel out. Subclasses add their networks to the lip encoder.

    A batch maps names to tensors: lips float32 [B, 1, F, 88, 88] normalised, identity [B, F, identity_dim],
    expression [B, F, expression_dim], frames int64 [B] (valid F of each clip); for training also, with T = 2F,
    units int64 [B, T], timbre [B, timbre_dim], pitch (standardised per clip) and energy [B, T], mel [B, 80, T].

    Buffers mel_mean and mel_std standardise the log-mel; whoever trains fills them from the training set.
    """

    mel_mean: Tensor
    mel_std: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.lip_encoder = LipEncoder(config.lip_encoder, config.ws)
        self.register_buffer("mel_mean", torch.tensor(0.0))
        self.register_buffer("mel_std", torch.tensor(1.0))

    @abstractmethod
    def losses(
        self, batch: Batch, generator: torch.Generator, place: Place | None = None, share: float | Tensor = 1.0
    ) -> dict[str, Tensor]:
        """Scalars, float32: `loss` (to be minimised), its parts unweighted under the names of `losses.total_loss`, and
        what is only looked at, without gradient.

        Args:
            batch: the step's batch, or a part of it.
            place: of the part in the whole, see `flow_loss`.
            share: valid frames of this part over their mean over all parts, so that the mean over parts is what the
                whole batch at once would give. Everything is a mean over frames but timbre, a mean over clips.
        """

    @abstractmethod
    def predict(self, batch: Batch, timbre: Tensor | None = None) -> dict[str, Tensor]:
        """What is read from silent clips, without gradient.

        Args:
            timbre: [B, timbre_dim], in place of the system's own; parts of one clip share a voice by it.

        Returns:
            float32: `mu` [B, 80, T], a standardised log-mel, and where the system has them `logits` [B, T, units],
            `pitch` (standardised per clip) and `energy` [B, T], `timbre` [B, timbre_dim]. What stands on padded frames
            means nothing.
        """

    @abstractmethod
    def render(
        self,
        prediction: Mapping[str, Tensor],
        mask: Tensor,
        generator: Generators,
        steps: int = 10,
        guidance: float = 0.7,
        temperature: float = 1.0,
    ) -> Tensor:
        """Log-mel [B, 80, T] in ln amplitude of a prediction; padded frames hold mel_mean.

        Args:
            mask: bool [B, T].
            generator: of the flow's noise, one for all or one for each clip; without a flow it is not used.
            steps, guidance, temperature: see `flow.sample`; without a flow they have no effect.
        """

    def forward(
        self, batch: Batch, generator: torch.Generator, place: Place | None = None, share: float | Tensor = 1.0
    ) -> dict[str, Tensor]:
        """As `losses`: what distributed training wraps."""
        return self.losses(batch, generator, place, share)

    @torch.no_grad()
    def synthesize(
        self,
        batch: Batch,
        generator: Generators,
        steps: int = 10,
        guidance: float = 0.7,
        temperature: float = 1.0,
    ) -> dict[str, Tensor]:
        """Log-mel and attributes of silent clips. Put the network into evaluation mode first.

        Returns:
            mel float32 [B, 80, T] in ln amplitude (padded frames hold mel_mean) and, where the system predicts them,
            units int64 [B, T], timbre [B, timbre_dim], pitch (standardised) and energy [B, T].
        """
        found = self.predict(batch)
        mask = length_mask(2 * batch["frames"], found["mu"].shape[2])
        mel = self.render(found, mask, generator, steps, guidance, temperature)
        units = {"units": found["logits"].argmax(-1)} if "logits" in found else {}
        return {"mel": mel, **units, **{name: found[name] for name in ("timbre", "pitch", "energy") if name in found}}

    def standardised(self, mel: Tensor, mask: Tensor) -> Tensor:
        """A log-mel [B, 80, T] on the networks' scale, zero on padded frames, whatever it held there."""
        return ((mel.float() - self.mel_mean) / self.mel_std).masked_fill(~mask[:, None], 0.0)

    def log_mel(self, mel: Tensor, mask: Tensor) -> Tensor:
        """A standardised mel [B, 80, T] in ln amplitude; padded frames hold mel_mean."""
        return mel.float().masked_fill(~mask[:, None], 0.0) * self.mel_std + self.mel_mean

"""The whole network: lips, identity and expression in, log-mel out."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from model import losses as terms
from model.avhubert import LipEncoder
from model.config import ModelConfig
from model.encoder import MEL_BINS, Encoded, HierarchicalEncoder, Targets
from model.flow import Place, flow_loss, sample
from model.layers import length_mask
from model.unet import UNet

Batch = Mapping[str, Tensor]


class FacesToVoices(nn.Module):
    """Lip encoder, hierarchical encoder and flow decoder.

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
        self.encoder = HierarchicalEncoder(config)
        self.decoder = UNet(config.decoder, MEL_BINS)
        self.register_buffer("mel_mean", torch.tensor(0.0))
        self.register_buffer("mel_std", torch.tensor(1.0))

    def encode(self, batch: Batch, targets: Targets | None = None) -> Encoded:
        """Lip encoder and hierarchical encoder; with `targets` teacher-forced."""
        mask = length_mask(batch["frames"], batch["lips"].shape[2])
        lips = self.lip_encoder(batch["lips"], mask)
        return self.encoder(lips, batch["identity"], batch["expression"], mask, targets)

    def losses(
        self, batch: Batch, generator: torch.Generator, place: Place | None = None, share: float | Tensor = 1.0
    ) -> dict[str, Tensor]:
        """Scalars, float32: `loss` (to be minimised), its parts unweighted, and `unit_accuracy` without gradient.

        Parts are cfm, prior, content and, unless switched off, timbre, pitch, energy; content, pitch and energy
        include their masked predictors.

        Args:
            batch: the step's batch, or a part of it.
            place: of the part in the whole, see `flow_loss`.
            share: valid frames of this part over their mean over all parts, so that the mean over parts is what the
                whole batch at once would give. Everything is a mean over frames but timbre, a mean over clips.
        """
        targets = Targets(batch["units"], batch["timbre"], batch["pitch"], batch["energy"])
        mask = length_mask(2 * batch["frames"], batch["mel"].shape[2])
        mel = (batch["mel"].float() - self.mel_mean) / self.mel_std
        mel = mel.masked_fill(~mask[:, None], 0.0)
        out = self.encode(batch, targets)
        parts = {
            "cfm": flow_loss(self.decoder, mel, out.mu, mask, self.config.flow, generator, place),
            "prior": terms.prior_loss(out.mu, mel, mask),
            **self._attribute_losses(out, targets, mask),
        }
        parts = {name: value if name == "timbre" else value * share for name, value in parts.items()}
        accuracy = terms.unit_accuracy(out.logits.detach(), targets.units, mask) * share
        return {"loss": terms.total_loss(parts, self.config.loss), **parts, "unit_accuracy": accuracy}

    forward = losses

    def _attribute_losses(self, out: Encoded, targets: Targets, mask: Tensor) -> dict[str, Tensor]:
        smoothing = self.config.loss.label_smoothing
        parts = {"content": terms.content_loss(out.logits, targets.units, mask, smoothing)}
        if out.masked_logits is not None:
            parts["content"] = parts["content"] + terms.content_loss(out.masked_logits, targets.units, mask, smoothing)
        if out.timbre is not None:
            parts["timbre"] = terms.timbre_loss(out.timbre, targets.timbre)
        for name, plain, masked, target in (
            ("pitch", out.pitch, out.masked_pitch, targets.pitch),
            ("energy", out.energy, out.masked_energy, targets.energy),
        ):
            predictions = [value for value in (plain, masked) if value is not None]
            if predictions:
                parts[name] = torch.stack([terms.prosody_loss(p, target, mask) for p in predictions]).sum()
        return parts

    @torch.no_grad()
    def synthesize(
        self,
        batch: Batch,
        generator: torch.Generator,
        steps: int = 10,
        guidance: float = 0.7,
        temperature: float = 1.0,
    ) -> dict[str, Tensor]:
        """Log-mel and attributes of silent clips; needs lips, identity, expression and frames alone.

        Returns:
            mel float32 [B, 80, T] in ln amplitude (padded frames hold mel_mean); units int64 [B, T] and, unless
            switched off, timbre [B, timbre_dim], pitch (standardised) and energy [B, T]. Put the network into
            evaluation mode first.
        """
        out = self.encode(batch)
        mask = length_mask(2 * batch["frames"], out.mu.shape[2])
        mel = sample(self.decoder, out.mu, mask, generator, steps, guidance, temperature, self.config.flow.solver_t)
        found = {"mel": mel * self.mel_std + self.mel_mean, "units": out.logits.argmax(-1)}
        optional = {"timbre": out.timbre, "pitch": out.pitch, "energy": out.energy}
        return found | {name: value for name, value in optional.items() if value is not None}

"""The whole network: lips, identity and expression in, log-mel out."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from model import losses as terms
from model.config import ModelConfig
from model.encoder import MEL_BINS, Encoded, HierarchicalEncoder, Targets
from model.flow import Place, flow_loss, sample
from model.layers import length_mask
from model.system import Batch, Generators, System
from model.unet import UNet


class FacesToVoices(System):
    """Lip encoder, hierarchical encoder and flow decoder."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.encoder = HierarchicalEncoder(config)
        self.decoder = UNet(config.decoder, MEL_BINS)

    def encode(self, batch: Batch, targets: Targets | None = None, timbre: Tensor | None = None) -> Encoded:
        """Lip encoder and hierarchical encoder; with `targets` teacher-forced, else told `timbre` where given."""
        mask = length_mask(batch["frames"], batch["lips"].shape[2])
        lips = self.lip_encoder(batch["lips"], mask)
        return self.encoder(lips, batch["identity"], batch["expression"], mask, targets, timbre)

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
        mel = self.standardised(batch["mel"], mask)
        out = self.encode(batch, targets)
        parts = {
            "cfm": flow_loss(self.decoder, mel, out.mu, mask, self.config.flow, generator, place),
            "prior": terms.prior_loss(out.mu, mel, mask),
            **self._attribute_losses(out, targets, mask),
        }
        parts = {name: value if name == "timbre" else value * share for name, value in parts.items()}
        accuracy = terms.unit_accuracy(out.logits.detach(), targets.units, mask) * share
        return {"loss": terms.total_loss(parts, self.config.loss), **parts, "unit_accuracy": accuracy}

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
    def predict(self, batch: Batch, timbre: Tensor | None = None) -> dict[str, Tensor]:
        """What is read from silent clips; needs lips, identity, expression and frames alone.

        Args:
            timbre: [B, timbre_dim], taken in place of the predicted one; parts of one clip share a voice by it.

        Returns:
            float32: mu [B, 80, T], standardised; logits [B, T, units]; and, unless switched off, timbre
            [B, timbre_dim], pitch (standardised) and energy [B, T].
        """
        out = self.encode(batch, timbre=timbre)
        found = {"mu": out.mu, "logits": out.logits}
        optional = {"timbre": out.timbre, "pitch": out.pitch, "energy": out.energy}
        found |= {name: value for name, value in optional.items() if value is not None}
        if timbre is not None and "timbre" in found:
            found["timbre"] = timbre
        return found

    @torch.no_grad()
    def render(
        self,
        prediction: Mapping[str, Tensor],
        mask: Tensor,
        generator: Generators,
        steps: int = 10,
        guidance: float = 0.7,
        temperature: float = 1.0,
    ) -> Tensor:
        """Log-mel float32 [B, 80, T] in ln amplitude from what `predict` gave; padded frames hold mel_mean.

        Args:
            mask: bool [B, T].
            generator, steps, guidance, temperature: see `model.flow.sample`.
        """
        law = self.config.flow.solver_t
        mel = sample(self.decoder, prediction["mu"], mask, generator, steps, guidance, temperature, law)
        return self.log_mel(mel, mask)

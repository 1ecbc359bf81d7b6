"""Hierarchical visual encoder: content, then timbre, then prosody, each read with the knowledge of the one before.

"From Faces to Voices" (CVPR 2025), section 3 and Eqs. 1-5. Sequences are [B, T, dim] at the acoustic rate T = 2F.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import ModelConfig
from model.layers import Fusion, TimeConv, Transformer, Up2, mean_over_time
from model.predictors import MaskedPredictor, Predictor

MEL_BINS = 80


@dataclass(frozen=True)
class Targets:
    """What teacher forcing feeds in place of predictions: units int64 [B, T] (below 0 in padding), timbre float32
    [B, timbre_dim], pitch and energy float32 [B, T]."""

    units: Tensor
    timbre: Tensor
    pitch: Tensor
    energy: Tensor


@dataclass(frozen=True)
class Encoded:
    """Output of the encoder, float32. Attributes of stages that are switched off, and the masked predictions
    without targets, are None.

    Attributes:
        mu: [B, 80, T], mean of the standardised log-mel.
        logits, masked_logits: [B, T, units].
        timbre: [B, timbre_dim].
        pitch, energy, masked_pitch, masked_energy: [B, T].
    """

    mu: Tensor
    logits: Tensor
    masked_logits: Tensor | None = None
    timbre: Tensor | None = None
    pitch: Tensor | None = None
    energy: Tensor | None = None
    masked_pitch: Tensor | None = None
    masked_energy: Tensor | None = None


class HierarchicalEncoder(nn.Module):
    """Lip, identity and expression features at the video rate to the mean log-mel and the speech attributes.

    The switches of the configuration take parts away:
    without `hier` there are no mappers and all stages read the lip features; without `timbre` its stage and the
    mapper into it are gone and prosody reads the mapped content; without `prosody` likewise; without `face_id` or
    `fe` the stage's hidden input takes the place of the fusion; without `mp` there are no masked predictors.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.encoder.dim
        self.lip_up = _up2(config, config.lip_encoder.dim)
        self.content = Content(config)
        self.timbre = Timbre(config) if config.timbre else None
        self.prosody = Prosody(config) if config.prosody else None
        self.to_timbre = _transformer(config) if config.hier and config.timbre else None
        self.to_prosody = _transformer(config) if config.hier and config.prosody else None
        self.decoder = _transformer(config)
        self.to_mel = nn.Linear(dim, MEL_BINS)

    def forward(
        self,
        lips: Tensor,
        identity: Tensor,
        expression: Tensor,
        mask: Tensor,
        targets: Targets | None = None,
        timbre: Tensor | None = None,
    ) -> Encoded:
        """Encode a batch.

        Args:
            lips: [B, F, lip_encoder.dim]; identity: [B, F, identity_dim]; expression: [B, F, expression_dim].
            mask: bool [B, F].
            targets: teacher forcing and the masked predictions; None feeds the predictions themselves.
            timbre: [B, timbre_dim], fed in place of the predicted one without teacher forcing.
        """
        mask2 = mask.repeat_interleave(2, dim=1)
        seen = self.lip_up(lips, mask)
        predictions, hidden = self.content(seen, mask2, targets)
        if self.timbre is not None:
            source = seen if self.to_timbre is None else self.to_timbre(hidden, mask2)
            predicted, added = self.timbre(source, identity, mask, timbre if targets is None else targets.timbre)
            predictions |= predicted
            hidden = hidden + added
        if self.prosody is not None:
            source = seen if self.to_prosody is None else self.to_prosody(hidden, mask2)
            predicted, added = self.prosody(source, expression, mask, targets)
            predictions |= predicted
            hidden = hidden + added
        mu = self.to_mel(self.decoder(hidden, mask2)).transpose(1, 2)
        return Encoded(mu=mu.float(), **{name: value.float() for name, value in predictions.items()})


def _transformer(config: ModelConfig) -> Transformer:
    c = config.encoder
    return Transformer(c.dim, c.layers, c.heads, c.ffn, c.dropout, c.attention_dropout, c.positions)


def _up2(config: ModelConfig, inputs: int) -> Up2:
    return Up2(inputs, config.encoder.dim, config.encoder.up_kernel, config.encoder.up_conv)


def _fusion(config: ModelConfig) -> Fusion:
    c = config.encoder
    return Fusion(c.dim, c.fusion_kernel, c.fusion_layers, c.fusion_dropout)


class Content(nn.Module):
    """Unit predictor, and the embedding of the units that is added to the lip features (Eq. 1)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.predictor = Predictor(config.encoder, config.units)
        self.masked = MaskedPredictor(config.encoder, config.units) if config.mp else None
        self.embedding = nn.Embedding(config.units, config.encoder.dim)

    def forward(self, x: Tensor, mask: Tensor, targets: Targets | None) -> tuple[dict[str, Tensor], Tensor]:
        """Predictions by name, and the hidden sequence [B, T, dim]."""
        found = {"logits": self.predictor(x, mask)}
        if targets is not None and self.masked is not None:
            found["masked_logits"] = self.masked(x, mask)
        units = found["logits"].argmax(-1) if targets is None else targets.units.clamp(min=0)
        return found, x + self.embedding(units)


class Timbre(nn.Module):
    """One timbre vector per clip from the hidden sequence and the identity features (Eq. 2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.mean_identity = config.encoder.identity == "mean"
        self.normalize_identity = config.encoder.normalize_identity
        self.up = _up2(config, config.identity_dim) if config.face_id else None
        self.fusion = _fusion(config) if config.face_id else None
        self.predictor = Predictor(config.encoder, config.timbre_dim)
        self.embedding = nn.Linear(config.timbre_dim, config.encoder.dim)

    def forward(
        self, x: Tensor, identity: Tensor, mask: Tensor, given: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Prediction by name, and what the stage adds to the hidden sequence, which is told the timbre `given`, or the
        predicted one; `mask` is at the video rate."""
        mask2 = mask.repeat_interleave(2, dim=1)
        if self.up is not None and self.fusion is not None:
            x = self.fusion(self.up(self._identity(identity, mask), mask), x, mask2)
        timbre = mean_over_time(self.predictor(x, mask2), mask2)
        return {"timbre": timbre}, x + self.embedding(timbre if given is None else given)[:, None]

    def _identity(self, identity: Tensor, mask: Tensor) -> Tensor:
        if self.mean_identity:
            identity = mean_over_time(identity, mask)[:, None].expand_as(identity)
        return F.normalize(identity, dim=-1) if self.normalize_identity else identity


class Prosody(nn.Module):
    """Pitch and energy per frame from the hidden sequence and the expression features (Eq. 3)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim, kernel = config.encoder.dim, config.encoder.prosody_kernel
        self.up = _up2(config, config.expression_dim) if config.fe else None
        self.fusion = _fusion(config) if config.fe else None
        self.pitch, self.energy = Predictor(config.encoder, 1), Predictor(config.encoder, 1)
        self.masked = (
            nn.ModuleDict({name: MaskedPredictor(config.encoder, 1) for name in ("pitch", "energy")})
            if config.mp
            else None
        )
        self.pitch_embedding, self.energy_embedding = TimeConv(1, dim, kernel), TimeConv(1, dim, kernel)

    def forward(
        self, x: Tensor, expression: Tensor, mask: Tensor, targets: Targets | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Predictions by name, and what the stage adds to the hidden sequence; `mask` is at the video rate."""
        mask2 = mask.repeat_interleave(2, dim=1)
        if self.up is not None and self.fusion is not None:
            x = self.fusion(self.up(expression, mask), x, mask2)
        found = {"pitch": self.pitch(x, mask2)[..., 0], "energy": self.energy(x, mask2)[..., 0]}
        if targets is not None and self.masked is not None:
            for name, predictor in self.masked.items():
                found[f"masked_{name}"] = predictor(x, mask2)[..., 0]
        pitch, energy = (found["pitch"], found["energy"]) if targets is None else (targets.pitch, targets.energy)
        # Padding of a target may hold anything, NaN included, which a product with the mask would keep.
        pitch, energy = (torch.where(mask2, value, 0.0)[..., None] for value in (pitch, energy))
        return found, x + self.pitch_embedding(pitch, mask2) + self.energy_embedding(energy, mask2)

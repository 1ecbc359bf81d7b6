"""After V2SFlow (Choi et al. 2025): content, pitch and speaker read from the video and spoken by a rectified flow."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model import losses as terms
from model.baselines.baseline import Baseline
from model.baselines.conformer import beside
from model.baselines.dit import DiT
from model.config import ModelConfig
from model.encoder import MEL_BINS
from model.flow import Place, flow_loss, sample
from model.layers import TimeConv, Transformer, mean_over_time
from model.system import Batch, Generators


class V2SFlow(Baseline):
    """Conformer with three heads, each reading by itself, and a Diffusion Transformer on what they found.

    In training the decoder is given the true units, pitch and timbre, so that its gradient does not reach the heads;
    in synthesis what the heads say. Each attribute is embedded in as many channels as the mel has; together they are
    the condition, zeros where guidance leads away from it. `mu`, a linear reading of the condition, is trained as a
    mean of the mel; the decoder begins from it with `dit.residual` alone.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        seen, dim = config.conformer.dim, config.dit.dim
        self.to_units, self.to_pitch = nn.Linear(seen, config.units), nn.Linear(seen, 1)
        self.to_timbre = None
        if config.speaker == "face":
            self.to_timbre = nn.Sequential(
                nn.Linear(seen + self.speaker_dim, seen), nn.GELU(), nn.Linear(seen, config.timbre_dim)
            )
        self.unit_embedding = nn.Embedding(config.units, dim)
        self.unit_adapter = Adapter(config)
        self.pitch_embedding = TimeConv(1, dim, config.encoder.prosody_kernel)
        self.pitch_adapter = Adapter(config)
        self.timbre_embedding = nn.Linear(config.timbre_dim, MEL_BINS)
        self.mean = nn.Conv1d(3 * MEL_BINS, MEL_BINS, 1, bias=False)
        self.decoder = DiT(config.dit, MEL_BINS, 3 * MEL_BINS)

    def read(self, batch: Batch, timbre: Tensor | None = None) -> dict[str, Tensor]:
        """See `System.predict`: mu, logits, pitch and timbre, which with `speaker: voice` is the one that was given."""
        found, mask = self._attributes(batch, timbre)
        return {"mu": self.mean(self._spoken(found, mask)).float(), **found}

    def losses(
        self, batch: Batch, generator: torch.Generator, place: Place | None = None, share: float | Tensor = 1.0
    ) -> dict[str, Tensor]:
        """See `System.losses`; the parts are cfm, prior, content, pitch and, read from the face, timbre."""
        found, mask = self._attributes(batch)
        mel, units = self.standardised(batch["mel"], mask), batch["units"]
        condition = self._condition(units.clamp(min=0), batch["pitch"], batch["timbre"], mask)
        flow = self.config.rectified_flow
        smoothing = self.config.loss.label_smoothing
        parts = {
            "cfm": flow_loss(self.velocity, mel, condition, mask, flow, generator, place) * share,
            "prior": terms.prior_loss(self.mean(condition), mel, mask) * share,
            "content": terms.content_loss(found["logits"], units, mask, smoothing) * share,
            "pitch": terms.prosody_loss(found["pitch"], batch["pitch"], mask) * share,
        }
        if self.to_timbre is not None:
            parts["timbre"] = terms.timbre_loss(found["timbre"], batch["timbre"])
        accuracy = terms.unit_accuracy(found["logits"].detach(), units, mask) * share
        return {"loss": terms.total_loss(parts, self.config.loss), **parts, "unit_accuracy": accuracy}

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
        """See `System.render`; reads logits, pitch and timbre."""
        condition, law = self._spoken(prediction, mask), self.config.rectified_flow.solver_t
        mel = sample(self.velocity, condition, mask, generator, steps, guidance, temperature, law, MEL_BINS)
        return self.log_mel(mel, mask)

    def velocity(self, x: Tensor, t: Tensor, condition: Tensor, mask: Tensor) -> Tensor:
        """Of the flow at x [B, 80, T]; condition [B, 240, T]."""
        found = self.decoder(x, t, condition, mask)
        return found + self.mean(condition) - x if self.config.dit.residual else found

    def _attributes(self, batch: Batch, timbre: Tensor | None = None) -> tuple[dict[str, Tensor], Tensor]:
        """What the heads say, float32, and the mask [B, T]."""
        hidden, mask = self.hidden(batch)
        found = {"logits": self.to_units(hidden).float(), "pitch": self.to_pitch(hidden)[..., 0].float()}
        if self.to_timbre is None:
            found |= self.given_voice(batch, timbre)
        elif timbre is not None:
            found["timbre"] = timbre.float()
        else:
            found["timbre"] = mean_over_time(self.to_timbre(beside(hidden, self.speaker(batch))), mask)
        return found, mask

    def _spoken(self, found: Mapping[str, Tensor], mask: Tensor) -> Tensor:
        return self._condition(found["logits"].argmax(-1), found["pitch"], found["timbre"], mask)

    def _condition(self, units: Tensor, pitch: Tensor, timbre: Tensor, mask: Tensor) -> Tensor:
        """Attributes side by side, float32 [B, 240, T], zero on padded frames."""
        # Padding of a target may hold anything, NaN included, which a product with the mask would keep.
        pitch = torch.where(mask, pitch.float(), 0.0)[..., None]
        content = self.unit_adapter(self.unit_embedding(units), mask)
        melody = self.pitch_adapter(self.pitch_embedding(pitch, mask), mask)
        voice = self.timbre_embedding(F.layer_norm(timbre.float(), timbre.shape[-1:]))
        return (beside(torch.cat([content, melody], dim=-1), voice) * mask[..., None]).transpose(1, 2).float()


class Adapter(nn.Module):
    """A Transformer over one attribute, and a linear layer to the channels of the mel: [B, T, dim] -> [B, T, 80]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = config.dit
        self.transformer = Transformer(c.dim, c.adapter_layers, c.heads, c.adapter_ffn, c.dropout, c.dropout, "rotary")
        self.to_mel = nn.Linear(c.dim, MEL_BINS)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.to_mel(self.transformer(x, mask))

"""Configuration of the Transformers that only baselines have."""

from __future__ import annotations

from pydantic import Field, model_validator

from shards.config import Config


def pairs_of_channels(dim: int, heads: int) -> None:
    if dim % (2 * heads):
        raise ValueError(f"dim {dim} must be a multiple of twice the heads {heads} (positions turn pairs of channels)")


class ConformerConfig(Config):
    """Conformer of the baselines, behind the lip encoder; the sizes are those of lip2speech-unit.

    Attributes:
        dim, layers, heads, ffn: width, blocks, attention heads, hidden width of the feed-forward parts.
        kernel: of the convolution (odd).
        dropout: on what each part adds, in the feed-forward parts and on the attention weights.
    """

    dim: int = Field(512, ge=1)
    layers: int = Field(12, ge=1)
    heads: int = Field(8, ge=1)
    ffn: int = Field(2048, ge=1)
    kernel: int = Field(31, ge=1)
    dropout: float = Field(0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _shapes(self) -> ConformerConfig:
        pairs_of_channels(self.dim, self.heads)
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel {self.kernel} must be odd, so that frames keep their place")
        return self


class DiTConfig(Config):
    """Diffusion Transformer of V2SFlow; the sizes are those of its public code.

    Attributes:
        dim, layers, heads, ffn: width, blocks, attention heads, hidden width of the feed-forward part.
        adapter_layers, adapter_ffn: of the Transformers over the units and over the pitch, which have its width.
        dropout: on the attention weights and on what attention adds, in the adapters on every part.
        residual: the network predicts what the way from the noisy mel to the mean, as read from the condition, lacks to
            the velocity. Not in the paper; see the decoder's key.
    """

    dim: int = Field(512, ge=4)  # two rates of the time's sines at least
    layers: int = Field(8, ge=1)
    heads: int = Field(4, ge=1)
    ffn: int = Field(1024, ge=1)
    adapter_layers: int = Field(2, ge=1)
    adapter_ffn: int = Field(1024, ge=1)
    dropout: float = Field(0.1, ge=0, lt=1)
    residual: bool = False

    @model_validator(mode="after")
    def _shapes(self) -> DiTConfig:
        pairs_of_channels(self.dim, self.heads)
        return self

"""Configuration of the networks and their losses: the paper's sizes, and a preset that trains on a CPU."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from model.transformer_config import ConformerConfig, DiTConfig, pairs_of_channels
from shards.config import Config, load_config

Width = Annotated[int, Field(ge=1)]


class LipEncoderConfig(Config):
    """AV-HuBERT video path. The defaults are the public Large model (324.5 M parameters), frozen.

    Attributes:
        stem, stem_stride: channels and spatial stride of the 3-D convolution (the public model has stride 2).
        trunk, trunk_blocks: channels of the four ResNet stages, basic blocks in each.
        dim, layers, heads, ffn: Transformer.
        pos_kernel, pos_groups: grouped convolution that stands for positions.
        dropout: everywhere in the network while it is trained; a frozen network has none.
        frozen: evaluation mode and no gradient, whatever `train()` says; layer weights still learn.
        include_input: the weighted sum also takes the input of the first layer.
        normalize: parameter-free LayerNorm on every state before summing.
    """

    stem: int = Field(64, ge=1)
    stem_stride: int = Field(2, ge=1)
    trunk: tuple[Width, Width, Width, Width] = (64, 128, 256, 512)
    trunk_blocks: int = Field(2, ge=1)
    dim: int = Field(1024, ge=1)
    layers: int = Field(24, ge=1)
    heads: int = Field(16, ge=1)
    ffn: int = Field(4096, ge=1)
    pos_kernel: int = Field(128, ge=1)
    pos_groups: int = Field(16, ge=1)
    dropout: float = Field(0.1, ge=0, lt=1)
    frozen: bool = True
    include_input: bool = False
    normalize: bool = False

    @model_validator(mode="after")
    def _divides(self) -> LipEncoderConfig:
        if self.dim % self.heads or self.dim % self.pos_groups:
            raise ValueError(
                f"dim {self.dim} must be a multiple of heads {self.heads} and pos_groups {self.pos_groups}"
            )
        return self


class EncoderConfig(Config):
    """Hierarchical visual encoder.

    Attributes:
        dim: width of every hidden sequence.
        layers, heads, ffn: of each of the three Transformers.
        dropout, attention_dropout: in them, on what a layer adds (and within its feed-forward part), and on the
            attention weights.
        positions: turned into queries and keys (`rotary`: relative, so longer clips than in training work), or added
            to the input of each Transformer (`sinusoidal`).
        blocks, kernel, expansion: ConvNeXt-V2 blocks of a predictor.
        norm_eps, grn_eps: added in a block to the variance of its LayerNorm, and to the mean norm of its GRN.
        drop_path: chance, in training, that a clip skips a block.
        head_dropout: ahead of a predictor's last layer.
        masked_kernel, masked_gap: taps of the masked convolution; how many in its middle are blind (odd).
        masked_hidden, masked_activation: layers between that convolution and the head, each on its frame alone, and
            what follows the convolution and each of them.
        prosody_kernel: convolutions that embed pitch and energy (odd).
        up_kernel, up_conv: transposed convolution from the video rate to the acoustic rate (even), and the plain one
            behind it (odd).
        fusion_kernel, fusion_layers, fusion_dropout: convolutions that fuse a face feature with the hidden sequence.
        identity: features `frames` by frames, or their `mean` over the clip in every frame.
        normalize_identity: identity features, or their mean, have unit length. Stored ones have it already.
    """

    dim: int = Field(512, ge=1)
    layers: int = Field(2, ge=1)
    heads: int = Field(4, ge=1)
    ffn: int = Field(2048, ge=1)
    dropout: float = Field(0.1, ge=0, lt=1)
    attention_dropout: float = Field(0.1, ge=0, lt=1)
    positions: Literal["rotary", "sinusoidal"] = "rotary"
    blocks: int = Field(3, ge=1)
    kernel: int = Field(7, ge=1)
    expansion: int = Field(4, ge=1)
    norm_eps: float = Field(1e-6, gt=0)
    grn_eps: float = Field(1e-6, gt=0)
    drop_path: float = Field(0.0, ge=0, lt=1)
    head_dropout: float = Field(0.1, ge=0, lt=1)
    masked_kernel: int = Field(15, ge=3)
    masked_gap: int = Field(5, ge=1)
    masked_hidden: int = Field(1, ge=0)
    masked_activation: Literal["gelu", "tanh"] = "gelu"
    prosody_kernel: int = Field(9, ge=1)
    up_kernel: int = Field(4, ge=2)
    up_conv: int = Field(3, ge=1)
    fusion_kernel: int = Field(3, ge=1)
    fusion_layers: int = Field(2, ge=1)
    fusion_dropout: float = Field(0.1, ge=0, lt=1)
    identity: Literal["frames", "mean"] = "frames"
    normalize_identity: bool = True

    @model_validator(mode="after")
    def _shapes(self) -> EncoderConfig:
        pairs_of_channels(self.dim, self.heads)
        for key in ("kernel", "masked_kernel", "masked_gap", "prosody_kernel", "up_conv", "fusion_kernel"):
            if getattr(self, key) % 2 == 0:
                raise ValueError(f"{key} {getattr(self, key)} must be odd, so that frames keep their place")
        if self.up_kernel % 2:
            raise ValueError(f"up_kernel {self.up_kernel} must be even, so that the frames double exactly")
        if self.masked_gap >= self.masked_kernel:
            raise ValueError(f"masked_gap {self.masked_gap} must be below masked_kernel {self.masked_kernel}")
        return self


class DecoderConfig(Config):
    """U-Net that predicts the velocity, in the shape of Matcha-TTS.

    Attributes:
        channels: per level; time is halved between levels (two levels: one halving).
        blocks, mid_blocks: residual block + Transformer block pairs per level and in the middle.
        heads, head_dim: self-attention; `ffn` is the expansion of its feed-forward part.
        residual: the network predicts what mu - x, the way from the noisy mel to its mean, lacks to the velocity.
            Not in the paper; without it a short training never learns to take the noise away.
    """

    channels: tuple[Width, Width] = (256, 256)
    blocks: int = Field(1, ge=1)
    mid_blocks: int = Field(2, ge=1)
    heads: int = Field(2, ge=1)
    head_dim: int = Field(64, ge=1)
    ffn: int = Field(4, ge=1)
    dropout: float = Field(0.05, ge=0, lt=1)
    residual: bool = False

    @model_validator(mode="after")
    def _groups(self) -> DecoderConfig:
        if any(width % 8 for width in self.channels):
            raise ValueError(f"channels {self.channels} must be multiples of 8 (GroupNorm)")
        return self


class FlowConfig(Config):
    """Conditional flow matching.

    Attributes:
        sigma: width left of the noise at t = 1.
        train_t: law of the training times: `cosine` is denser near t = 0 (CosyVoice), or `uniform`.
        solver_t: law of the solver's grid of times.
        cfg_dropout: share of samples trained without their condition.
    """

    sigma: float = Field(1e-4, ge=0, lt=1)
    train_t: Literal["cosine", "uniform"] = "cosine"
    solver_t: Literal["cosine", "uniform"] = "cosine"
    cfg_dropout: float = Field(0.1, ge=0, le=1)


class RectifiedFlowConfig(FlowConfig):
    """The flow of V2SFlow: a straight path all the way to the mel, its times drawn evenly."""

    sigma: float = Field(0.0, ge=0, lt=1)
    train_t: Literal["cosine", "uniform"] = "uniform"
    solver_t: Literal["cosine", "uniform"] = "uniform"


class LossConfig(Config):
    """Weights of the training loss (Eq. 7), and the label smoothing of the units (1 - alpha of Eq. 1).

    `mel` is the weight of the baselines' L1 distance.
    """

    cfm: float = Field(1.0, ge=0)
    prior: float = Field(1.0, ge=0)
    mel: float = Field(1.0, ge=0)
    content: float = Field(0.5, ge=0)
    timbre: float = Field(0.5, ge=0)
    prosody: float = Field(0.5, ge=0)
    label_smoothing: float = Field(0.1, ge=0, lt=1)


class ModelConfig(Config):
    """Everything that shapes the network and its loss.

    Attributes:
        system: the paper's own, or one of the baselines it is compared with.
        identity_dim, expression_dim, timbre_dim: widths of the dataset's features.
        units: size of the dataset's unit inventory.
        hier: mappers between the stages; without them each attribute is read from the lip features at once.
        timbre, prosody: the stage exists; without it its mapper goes too.
        face_id, fe: identity and expression features are fused in; without, the hidden input passes unchanged.
        ws: weighted sum over the lip encoder's layers; without it the last one alone.
        mp: masked auxiliary predictors of content and prosody.
        speaker: what tells a baseline who speaks: the mean identity feature of the `face`, or the timbre of a reference
            `voice`, which synthesis must then be given.
        mel_scale: `corpus` standardises the log-mel by mean and deviation of the training set, for mu and for the flow,
            whose noise has deviation 1; `none` leaves it.
    """

    system: Literal["faces2voices", "svts", "intelligible", "v2sflow"] = "faces2voices"
    identity_dim: int = Field(512, ge=1)
    expression_dim: int = Field(768, ge=1)
    units: int = Field(1000, ge=2)
    timbre_dim: int = Field(1024, ge=1)

    hier: bool = True
    timbre: bool = True
    prosody: bool = True
    face_id: bool = True
    fe: bool = True
    ws: bool = True
    mp: bool = True
    speaker: Literal["face", "voice"] = "face"
    mel_scale: Literal["corpus", "none"] = "corpus"

    lip_encoder: LipEncoderConfig = LipEncoderConfig()
    encoder: EncoderConfig = EncoderConfig()
    decoder: DecoderConfig = DecoderConfig()
    flow: FlowConfig = FlowConfig()
    conformer: ConformerConfig = ConformerConfig()
    dit: DiTConfig = DiTConfig()
    rectified_flow: RectifiedFlowConfig = RectifiedFlowConfig()
    loss: LossConfig = LossConfig()

    @property
    def mean_identity(self) -> bool:
        """Whether identity features are read by their mean over the clip, which parts of one clip must share."""
        return self.encoder.identity == "mean" if self.system == "faces2voices" else self.speaker == "face"

    @property
    def told_voice(self) -> bool:
        """Whether synthesis must be given a voice, since the face says nothing of it."""
        return self.system != "faces2voices" and self.speaker == "voice"

    @classmethod
    def preset(cls, name: str) -> ModelConfig:
        """The configuration called `name` in `PRESETS`. Raises KeyError for another name."""
        return load_config(cls, base=PRESETS[name])


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "tiny": {
        "identity_dim": 128,
        "expression_dim": 102,
        "units": 100,
        "timbre_dim": 384,
        "lip_encoder": {
            "stem": 16,
            "stem_stride": 4,
            "trunk": (16, 32, 64, 128),
            "trunk_blocks": 1,
            "dim": 128,
            "layers": 3,
            "heads": 4,
            "ffn": 512,
            "pos_kernel": 32,
            "pos_groups": 8,
            "frozen": False,
        },
        "encoder": {"dim": 128, "layers": 1, "heads": 4, "ffn": 512, "blocks": 2},
        "decoder": {"channels": (96, 96), "head_dim": 32, "mid_blocks": 1, "residual": True},
        "conformer": {"dim": 192, "layers": 4, "heads": 4, "ffn": 768, "kernel": 15},
        "dit": {
            "dim": 128,
            "layers": 3,
            "heads": 4,
            "ffn": 256,
            "adapter_layers": 1,
            "adapter_ffn": 256,
            "residual": True,
        },
    },
}
"""Bases for `load_config(ModelConfig, base=...)`: the paper's model; one that learns in minutes on 2 cores."""

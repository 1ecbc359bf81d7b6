"""AV-HuBERT's video path against other code with the same tensors: a trunk of torch's own 3-D layers and transformers'
HuBERT encoder."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from model.avhubert import AVHubert
from model.config import LipEncoderConfig
from model.layers import length_mask
from model.lip_weights import DROPPED
from tests.public_avhubert import public_weights

transformers = pytest.importorskip("transformers")

SMALL = LipEncoderConfig(
    stem=8, trunk=(8, 12, 16, 24), dim=64, layers=4, heads=4, ffn=160, pos_kernel=128, pos_groups=16
)
RESNET = "feature_extractor_video.resnet."


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.PReLU(outputs),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        shortcut = (nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = nn.Sequential(*shortcut if stride == 2 else ())
        self.last = nn.PReLU(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.main(x) + self.shortcut(x))


PARTS = {"conv1": "main.0", "bn1": "main.1", "relu1": "main.2", "conv2": "main.3", "bn2": "main.4"}
PARTS |= {"relu2": "last", "downsample": "shortcut"}
HEADS = {
    "layer_norm": "projection.layer_norm",
    "post_extract_proj": "projection.projection",
    "encoder.layer_norm": "encoder.layer_norm",
    "feature_extractor_video.proj": "project",
}
LAYER = {
    "self_attn": "attention",
    "self_attn_layer_norm": "layer_norm",
    "fc1": "feed_forward.intermediate_dense",
    "fc2": "feed_forward.output_dense",
    "final_layer_norm": "final_layer_norm",
}
POSITIONS = {
    "weight_g": "parametrizations.weight.original0",
    "weight_v": "parametrizations.weight.original1",
    "bias": "bias",
}


class Reference(nn.Module):
    def __init__(self, config: LipEncoderConfig) -> None:
        super().__init__()
        from transformers.models.hubert import modeling_hubert

        self.stem = nn.Sequential(
            nn.Conv3d(1, config.stem, (5, 7, 7), (1, 2, 2), (2, 3, 3), bias=False),
            nn.BatchNorm3d(config.stem),
            nn.PReLU(config.stem),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
        )
        widths = [config.stem, *config.trunk]
        self.trunk = nn.Sequential()
        for level, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
            self.trunk.append(Block(inputs, outputs, 2 if level else 1))
            self.trunk.append(Block(outputs, outputs, 1))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.project = nn.Linear(config.trunk[-1], config.dim)
        shape = transformers.HubertConfig(
            hidden_size=config.dim,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=config.ffn,
            num_conv_pos_embeddings=config.pos_kernel,
            num_conv_pos_embedding_groups=config.pos_groups,
            conv_dim=(2 * config.dim,),
            conv_kernel=(1,),
            conv_stride=(1,),
            do_stable_layer_norm=True,
            attn_implementation="eager",
        )
        self.projection = modeling_hubert.HubertFeatureProjection(shape)
        self.encoder = modeling_hubert.HubertEncoderStableLayerNorm(shape)

    def load(self, weights: dict[str, Tensor]) -> None:
        self.load_state_dict({self.rename(key): value for key, value in weights.items() if not key.startswith(DROPPED)})

    @staticmethod
    def rename(key: str) -> str:
        """Name here of a tensor of the public checkpoint."""
        if key.startswith(f"{RESNET}frontend3D."):
            return key.replace(f"{RESNET}frontend3D.", "stem.")
        if key.startswith(f"{RESNET}trunk."):
            level, block, part, rest = key.removeprefix(f"{RESNET}trunk.layer").split(".", 3)
            return f"trunk.{2 * (int(level) - 1) + int(block)}.{PARTS[part]}.{rest}"
        if key.startswith("encoder.pos_conv.0."):
            return f"encoder.pos_conv_embed.conv.{POSITIONS[key.rpartition('.')[2]]}"
        if key.startswith("encoder.layers."):
            _, _, number, part, rest = key.split(".", 4)
            return f"encoder.layers.{number}.{LAYER[part]}.{rest}"
        module, _, name = key.rpartition(".")
        return f"{HEADS[module]}.{name}"

    def states(self, lips: Tensor) -> list[Tensor]:
        """Input of the first layer, then each layer's output, the last one normed, of one clip [1, 1, F, 88, 88]."""
        images = self.stem(lips)[0].transpose(0, 1)
        video = self.project(self.pool(self.trunk(images)).flatten(1))[None]
        found: list[Tensor] = []
        watch = [
            self.encoder.layers[0].register_forward_pre_hook(lambda _, inputs: found.append(inputs[0])),
            *(
                layer.register_forward_hook(
                    lambda _, __, output: found.append(output[0] if isinstance(output, tuple) else output)
                )
                for layer in self.encoder.layers[:-1]
            ),
        ]
        hidden = self.projection(torch.cat([torch.zeros_like(video), video], dim=-1))
        last = self.encoder(hidden).last_hidden_state
        for hook in watch:
            hook.remove()
        return [*found, last]


def pair(config: LipEncoderConfig, dtype: torch.dtype) -> tuple[AVHubert, Reference]:
    weights = public_weights(config)
    with torch.device("meta"):
        ours = AVHubert(config)
    ours.load_state_dict({key: value for key, value in weights.items() if not key.startswith(DROPPED)}, assign=True)
    reference = Reference(config)
    reference.load(weights)
    return ours.eval().to(dtype), reference.eval().to(dtype)


def clips(lengths: list[int], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(1, 1, length, 88, 88, generator=generator).to(dtype) for length in lengths]


DTYPES = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])


@torch.no_grad()
def compare(config: LipEncoderConfig, lengths: list[int], dtype: torch.dtype, tolerance: float) -> None:
    """Clips alone by the reference against clips alone, and in a batch padded with noise, by ours.

    The tolerance is that of numbers around 1. States grow with depth, and what float32 rounds off with them.
    """
    ours, reference = pair(config, dtype)
    parts, longest = clips(lengths, dtype), max(lengths)
    batch = torch.full((len(parts), 1, longest, 88, 88), 9.0, dtype=dtype)
    for row, part in zip(batch, parts, strict=True):
        row[:, : part.shape[2]] = part[0]
    padded = list(ours.states(batch, length_mask(torch.tensor(lengths), longest)))
    for row, (part, frames) in enumerate(zip(parts, lengths, strict=True)):
        expected = reference.states(part)
        alone = list(ours.states(part, torch.ones(1, frames, dtype=torch.bool)))
        assert len(expected) == len(alone) == len(padded) == config.layers + 1
        for layer, state in enumerate(expected):
            assert state.shape == (1, frames, config.dim)
            assert state.std() > 0.5, layer
            within = tolerance * max(1.0, float(state.std()))
            torch.testing.assert_close(alone[layer], state, rtol=0, atol=within)
            torch.testing.assert_close(padded[layer][row : row + 1, :frames], state, rtol=0, atol=within)


@DTYPES
def test_hidden_states_equal_those_of_other_code(dtype: torch.dtype, tolerance: float) -> None:
    compare(SMALL, [7, 12, 1], dtype, tolerance)


@pytest.mark.nightly
@DTYPES
def test_hidden_states_of_the_large_network(dtype: torch.dtype, tolerance: float) -> None:
    compare(LipEncoderConfig(), [9, 5], dtype, tolerance)

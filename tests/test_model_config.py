"""The model's configuration: the paper's numbers, no key without effect, wrong shapes in clear words."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from model.config import PRESETS, EncoderConfig, ModelConfig
from model.encoder import Encoded, HierarchicalEncoder, Targets
from model.faces2voices import FacesToVoices
from shards.config import load_config
from shards.errors import UserError

SMALL = {
    "identity_dim": 6,
    "expression_dim": 7,
    "units": 11,
    "timbre_dim": 9,
    "lip_encoder": {"dim": 16, "pos_groups": 4},
}
STILL = {"dim": 16, "layers": 1, "heads": 2, "ffn": 16, "blocks": 1} | dict.fromkeys(
    ("dropout", "attention_dropout", "fusion_dropout", "head_dropout"), 0.0
)
"""A small encoder in which nothing is left to chance."""
OTHER: dict[str, Any] = {
    "dim": 24,
    "layers": 2,
    "heads": 4,
    "ffn": 24,
    "dropout": 0.5,
    "attention_dropout": 0.5,
    "positions": "sinusoidal",
    "blocks": 2,
    "kernel": 5,
    "expansion": 2,
    "norm_eps": 0.1,
    "grn_eps": 0.1,
    "drop_path": 0.5,
    "head_dropout": 0.5,
    "masked_kernel": 13,
    "masked_gap": 3,
    "masked_hidden": 2,
    "masked_activation": "tanh",
    "prosody_kernel": 7,
    "up_kernel": 6,
    "up_conv": 5,
    "fusion_kernel": 5,
    "fusion_layers": 3,
    "fusion_dropout": 0.5,
    "identity": "mean",
    "normalize_identity": False,
}


def forward(**changes: Any) -> tuple[Encoded, int]:
    """What an encoder in training says of one clip, and how many parameters it has."""
    config = load_config(ModelConfig, base={**SMALL, "encoder": {**STILL, **changes}})
    torch.manual_seed(0)
    encoder = HierarchicalEncoder(config).train()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "response" in name:  # starts at zero, where its eps has no effect
                parameter.fill_(0.5)
    lips, identity, expression = (torch.randn(1, 8, width, generator=generator) for width in (16, 6, 7))
    pitch, energy = torch.randn(2, 1, 16, generator=generator)
    units, timbre = torch.arange(16)[None] % 11, torch.randn(1, 9, generator=generator)
    mask = torch.ones(1, 8, dtype=torch.bool)
    with torch.no_grad():
        out = encoder(lips, identity, expression, mask, Targets(units, timbre, pitch, energy))
    return out, sum(parameter.numel() for parameter in encoder.parameters())


def test_no_key_of_the_encoder_is_without_effect() -> None:
    assert set(OTHER) == set(EncoderConfig.model_fields)
    plain, count = forward()
    again, _ = forward()
    assert all(torch.equal(value, getattr(again, name)) for name, value in vars(plain).items())
    for key, value in OTHER.items():
        changed, size = forward(**{key: value})
        same = all(torch.equal(getattr(changed, name), one) for name, one in vars(plain).items())
        assert not same or size != count, key


def test_paper_sizes() -> None:
    with torch.device("meta"):
        network = FacesToVoices(ModelConfig.preset("paper"))

    def size(module: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    # By hand: a linear layer, a LayerNorm, a convolution.
    def linear(inputs: int, outputs: int) -> int:
        return inputs * outputs + outputs

    def conv(inputs: int, outputs: int, taps: int) -> int:
        return inputs * outputs * taps + outputs

    norm = 2 * 512
    transformer = 2 * (2 * norm + 4 * linear(512, 512) + linear(512, 2048) + linear(2048, 512)) + norm
    block = 512 * 7 + 512 + norm + linear(512, 2048) + 2 * 2048 + linear(2048, 512)
    up = {inputs: conv(inputs, 512, 4) + norm + conv(512, 512, 3) for inputs in (1024, 512, 768)}
    fusion = conv(1024, 512, 3) + conv(512, 512, 3) + 2 * norm

    def predictor(outputs: int) -> int:
        return 3 * block + norm + linear(512, outputs)

    def masked(outputs: int) -> int:
        return conv(512, 512, 15) + norm + linear(512, 512) + linear(512, outputs)

    content = predictor(1000) + masked(1000) + 1000 * 512
    timbre = up[512] + fusion + predictor(1024) + linear(1024, 512)
    prosody = up[768] + fusion + 2 * (predictor(1) + masked(1) + conv(1, 512, 9))
    encoder = up[1024] + content + timbre + prosody + 3 * transformer + linear(512, 80)
    assert size(network.encoder) == encoder == 71_267_876
    assert size(network.decoder) == 11_008_848
    assert size(network.lip_encoder.network) / 1e6 == pytest.approx(324.5, abs=0.05)
    trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    assert trained == encoder + 11_008_848 + 24  # and one weight for each layer of the lip encoder


def test_presets() -> None:
    assert ModelConfig.preset("paper") == ModelConfig()
    tiny = load_config(ModelConfig, overrides=["hier=false", "encoder.dim=64"], base=PRESETS["tiny"])
    assert (tiny.hier, tiny.encoder.dim, tiny.lip_encoder.frozen) == (False, 64, False)


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ("encoder.kernel=6", "kernel 6 must be odd"),
        ("encoder.masked_kernel=14", "masked_kernel 14 must be odd"),
        ("encoder.masked_gap=4", "masked_gap 4 must be odd"),
        ("encoder.masked_gap=15", "below masked_kernel"),
        ("encoder.prosody_kernel=8", "prosody_kernel 8 must be odd"),
        ("encoder.fusion_kernel=2", "fusion_kernel 2 must be odd"),
        ("encoder.up_conv=4", "up_conv 4 must be odd"),
        ("encoder.up_kernel=5", "up_kernel 5 must be even"),
        ("encoder.dim=10", "multiple of twice the heads"),
        ("encoder.positions=learned", "encoder.positions: choose from rotary, sinusoidal"),
        ("encoder.identity=median", "encoder.identity: choose from frames, mean"),
        ("encoder.drop_path=1", "encoder.drop_path: must be below 1"),
        ("encoder.head_dropout=-0.1", "encoder.head_dropout: must be at least 0"),
        ("encoder.grn_eps=0", "encoder.grn_eps: must be above 0"),
        ("decoder.channels=[12,12]", "multiples of 8"),
        ("decoder.channels=[0,8]", "decoder.channels.0: must be at least 1"),
        ("lip_encoder.heads=7", "multiple of heads"),
        ("lip_encoder.trunk=[64,0,8,8]", "lip_encoder.trunk.1: must be at least 1"),
        ("loss.timbre=-1", "loss.timbre: must be at least 0"),
    ],
)
def test_wrong_shapes_are_named(override: str, match: str) -> None:
    with pytest.raises(UserError, match=match):
        load_config(ModelConfig, overrides=[override])


def test_configuration_does_not_import_torch() -> None:
    code = "import sys, model.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

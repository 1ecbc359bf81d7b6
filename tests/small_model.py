"""A model small enough to run in every test, and random clips for it with garbage in their padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model.config import ModelConfig
from model.encoder import Targets
from model.faces2voices import FacesToVoices
from model.layers import length_mask
from shards.config import load_config

SMALL: dict[str, Any] = {
    "identity_dim": 6,
    "expression_dim": 7,
    "units": 11,
    "timbre_dim": 9,
    "lip_encoder": {
        "stem": 4,
        "stem_stride": 4,
        "trunk": [4, 4, 8, 8],
        "trunk_blocks": 1,
        "dim": 16,
        "layers": 2,
        "heads": 2,
        "ffn": 16,
        "pos_kernel": 8,
        "pos_groups": 4,
        "frozen": False,
    },
    "encoder": {"dim": 32, "layers": 1, "heads": 2, "ffn": 32, "blocks": 1},
    "decoder": {"channels": [16, 16], "head_dim": 8, "mid_blocks": 1},
}
NO_DROPOUT = dict.fromkeys(("dropout", "attention_dropout", "fusion_dropout", "head_dropout"), 0.0)


def config(**changes: Any) -> ModelConfig:
    return load_config(ModelConfig, base={**SMALL, **changes})


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(shape: ModelConfig, frames: tuple[int, ...] = (6, 10)) -> dict[str, Tensor]:
    """Random clips with garbage in their padding."""
    g, count, longest = seeded(3), len(frames), max(frames)
    lengths = torch.tensor(frames)
    made = {
        "lips": torch.randn(count, 1, longest, 32, 32, generator=g),
        "identity": torch.randn(count, longest, shape.identity_dim, generator=g),
        "expression": torch.randn(count, longest, shape.expression_dim, generator=g),
        "units": torch.randint(0, shape.units, (count, 2 * longest), generator=g),
        "timbre": torch.randn(count, shape.timbre_dim, generator=g),
        "pitch": torch.randn(count, 2 * longest, generator=g),
        "energy": torch.randn(count, 2 * longest, generator=g),
        "mel": 2 * torch.randn(count, 80, 2 * longest, generator=g) - 5,
        "frames": lengths,
    }
    video, sound = length_mask(lengths, longest), length_mask(2 * lengths, 2 * longest)
    made["units"][~sound] = -100
    made["pitch"][~sound] = 1e3
    made["mel"].transpose(1, 2)[~sound] = 1e3
    made["energy"][~sound] = float("nan")
    made["identity"][~video] = 1e3
    made["expression"][~video] = -1e3
    made["lips"][:, 0][~video] = 1e3
    return made


def targets(clips: dict[str, Tensor]) -> Targets:
    return Targets(clips["units"], clips["timbre"], clips["pitch"], clips["energy"])


def build(shape: ModelConfig) -> FacesToVoices:
    torch.manual_seed(0)
    return FacesToVoices(shape)


def first_alone(clips: dict[str, Tensor], frames: int) -> dict[str, Tensor]:
    cut = {"lips": 2, "identity": 1, "expression": 1, "units": 1, "pitch": 1, "energy": 1, "mel": 2}
    alone = {name: value[:1] for name, value in clips.items()}
    for name, axis in cut.items():
        length = frames if name in ("lips", "identity", "expression") else 2 * frames
        alone[name] = alone[name].narrow(axis, 0, length)
    return alone

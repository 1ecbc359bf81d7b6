"""An untrained checkpoint that speaks, and short films without sound of synthetic faces for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from model import checkpoint
from model.checkpoint import Checkpoint
from model.systems import build_network
from pipeline.config import BuildConfig
from pipeline.fingerprint import recipe_of
from pipeline.registry import VISUAL_STAGES, make_stage
from pipeline.synthetic.corpus import SPEAKERS, Take, make_take
from tests.small_model import config

WIDTHS = {"identity_dim": 128, "expression_dim": 102}
"""Of the offline stages."""


def untrained(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A run's folder with a small network of random parameters, as if trained on the offline profile's features."""
    torch.manual_seed(seed)
    shape = config(**{**WIDTHS, **changes})
    network = build_network(shape)
    network.mel_mean.fill_(-4.0)
    stages = {kind.name: recipe_of(make_stage(kind, BuildConfig(), None)).model_dump() for kind in VISUAL_STAGES}
    dataset = {"profile": "offline", "stages": {**stages, "mel": {"settings": {"filterbank": "htk"}}}}
    plain = shape.model_dump(mode="json")
    checkpoint.save(folder, Checkpoint(7, {}, plain, dataset, network.state_dict(), {}), keep=1)
    return folder


def features(frames: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Made-up visual features of a clip."""
    random = np.random.default_rng(seed)
    return {
        "lips": random.integers(0, 256, (frames, 96, 96), np.uint8),
        "identity": random.normal(size=(frames, 128)).astype(np.float16),
        "expression": random.normal(size=(frames, 102)).astype(np.float16),
    }


def talking(speaker: int = 0) -> np.ndarray:
    """Frames uint8 [F, 192, 192, 3] of a synthetic face."""
    words = ("set", "red", "by", "K", "six", "now")
    return np.stack(list(make_take(Take("train", SPEAKERS[speaker], words, (0, 0)), 192)[0]))

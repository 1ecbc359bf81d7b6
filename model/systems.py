"""The systems that can be trained from the same shards, by the name of `ModelConfig.system`."""

from __future__ import annotations

from model.baselines.intelligible import Intelligible
from model.baselines.svts import SVTS
from model.baselines.v2sflow import V2SFlow
from model.config import ModelConfig
from model.faces2voices import FacesToVoices
from model.system import System

SYSTEMS: dict[str, type[System]] = {
    "faces2voices": FacesToVoices,
    "svts": SVTS,
    "intelligible": Intelligible,
    "v2sflow": V2SFlow,
}


def build_network(config: ModelConfig) -> System:
    """The network of a configuration, with random parameters, on the CPU."""
    return SYSTEMS[config.system](config)

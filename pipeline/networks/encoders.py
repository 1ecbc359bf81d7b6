"""The speech encoders that units and timbre may come from, behind one interface."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.networks.device import Precision
from shards.errors import UserError

if TYPE_CHECKING:
    import torch

Encoder = Literal["whisper_tiny", "hubert_large"]
Floats = NDArray[np.float32]
WIDTHS: dict[Encoder, int] = {"whisper_tiny": 384, "hubert_large": 1024}
"""Channels of the features, known before a network is loaded."""
LAYERS: dict[Encoder, int] = {"whisper_tiny": 4, "hubert_large": 24}
"""Transformer layers, known before a network is loaded."""


class SpeechEncoder(Protocol):
    """A frozen network from sound to features at 50 Hz, frame k centred on sample 320k + 160.

    Attributes:
        width: channels of the features.
        layers: transformer layers.
        budget: acoustic frames, padding among them, that are best encoded at once on its device.
        waste: largest share of them that may be padding.
    """

    width: int
    layers: int
    budget: int
    waste: float

    def encode(self, waves: Sequence[Floats], layer: int) -> list[tuple[Floats, Floats]]:
        """Per clip (mono 16 kHz, float32 [640F] in [-1, 1]): the first layer's mean over time, float32 [width], and
        the output of a layer (1-based), float32 [2F, width]. The other clips change a result by rounding alone."""
        ...


def encoder_files(name: Encoder, folder: Path | None) -> list[Path]:
    """The files whose bytes decide what an encoder gives; `folder` as in `find_checkpoint`.

    Raises:
        UserError: they are not there and cannot be fetched.
    """
    if name == "whisper_tiny":
        from pipeline.networks.ctranslate2 import find_weights

        return [find_weights()]
    return [_hubert().find_hubert(folder)]


def make_encoder(
    name: Encoder, layer: int, folder: Path | None, precision: Precision = "float32", device: torch.device | None = None
) -> SpeechEncoder:
    """An encoder with its weights.

    Args:
        layer: that will be asked for.
        device: where it runs; None takes the GPU where this process has one.

    Raises:
        UserError: weights that are missing or damaged, a layer that it does not have.
    """
    from pipeline.networks.device import pick_device
    from pipeline.networks.whisper import load_encoder

    device = device or pick_device()
    (path,) = encoder_files(name, folder)
    encoder: SpeechEncoder
    if name == "whisper_tiny":
        encoder = load_encoder(path, device, precision)
    else:
        encoder = _hubert().load_hubert(path, device, precision)
    if layer > encoder.layers:
        raise UserError(f"speech.layer {layer}: {name} has {encoder.layers} layers")
    return encoder


def _hubert():  # type: ignore[no-untyped-def]
    try:
        from pipeline.networks import hubert
    except ImportError as error:
        if error.name not in ("transformers", "safetensors"):
            raise
        raise UserError(
            f"speech.encoder hubert_large: package {error.name} is missing; pip install 'faces2voices[paper]'"
        ) from None
    return hubert

"""HuBERT-Large (Hsu et al. 2021), pre-trained on Libri-Light, through `transformers`, on our 50 Hz frame grid.

Seven strided convolutions (stride 320, reach 400 samples), a projection, a grouped convolution that stands for
positions, and 24 pre-norm transformer layers. Alone they give one frame less than 2F for 640F samples; 40 reflected
samples on each side give exactly 2F, and centre frame k on sample 320k + 160 like mel frame k (AdaptVC pads alike).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils import parametrize
from transformers import HubertConfig, HubertModel

from pipeline.batches import WASTE
from pipeline.networks.device import Precision, compute_type
from pipeline.networks.weights import FOLDER, Checkpoint, checked, find_checkpoint, load_strict, load_tensors
from shards.schema import HOP
from shards.storage import user_cache

WHAT = "HuBERT-Large LL60k"
CHECKPOINT = Checkpoint(
    what=WHAT,
    file="hubert-large-ll60k/pytorch_model.bin",
    url="https://huggingface.co/facebook/hubert-large-ll60k/resolve/main/pytorch_model.bin",
)
SAFE = "hubert-large-ll60k/model.safetensors"
"""The same tensors as transformers saves them today; taken first where it lies beside."""

PAD = 40
EPS = 1e-7
"""Of the normalisation, as in Hugging Face's extractor (fairseq has 1e-5, which shrinks quiet sound)."""

Floats = NDArray[np.float32]


def large() -> HubertConfig:
    """The published shape: layer-norm extractor with biases, stable layer norm, no masking and no dropout."""
    return HubertConfig(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        conv_dim=(512,) * 7,
        conv_kernel=(10, 3, 3, 3, 3, 2, 2),
        conv_stride=(5, 2, 2, 2, 2, 2, 2),
        conv_bias=True,
        feat_extract_norm="layer",
        feat_proj_layer_norm=True,
        num_conv_pos_embeddings=128,
        num_conv_pos_embedding_groups=16,
        do_stable_layer_norm=True,
        mask_time_prob=0.0,
        mask_feature_prob=0.0,
    )


class HubertEncoder:
    """A loaded HuBERT.

    Attributes:
        width: channels of the features; layers: transformer layers; budget, waste: see `SpeechEncoder`.
    """

    def __init__(self, network: HubertModel, device: torch.device, precision: Precision) -> None:
        convolution = network.encoder.pos_conv_embed.conv
        if parametrize.is_parametrized(convolution):
            # Else the normalised weight, 8 M numbers, is computed anew at each call.
            parametrize.remove_parametrizations(convolution, "weight")
        self._type = compute_type(precision)
        module: Any = network  # `to` has no usable type there
        self._network: HubertModel = module.to(device, self._type).eval().requires_grad_(False)
        self._device = device
        self.width: int = network.config.hidden_size
        self.layers: int = network.config.num_hidden_layers
        # A processor is busy with a few seconds of sound: only short clips gain from company. A GPU wants minutes.
        self.budget = 300 if device.type == "cpu" else 8000
        # Masked or not, padding changes the order in which attention sums, and with it the last of few bits.
        self.waste = WASTE if precision == "float32" else 0.0

    def encode(self, waves: Sequence[Floats], layer: int) -> list[tuple[Floats, Floats]]:
        """Features of clips, computed in one batch.

        What a clip gives agrees with what it gives alone: in float32 to 1e-4; in bfloat16 to 0.1 (where features'
        deviation is 1: its least step is 0.4 %), and beside clips of equal length, on processors, to the last bit.

        Args:
            waves: mono 16 kHz, float32 [640F] each.
            layer: whose output is wanted, 1-based; the last one's comes after the final LayerNorm.

        Returns:
            Per clip, the first layer's mean over time, float32 [width], and the features, float32 [2F, width].
        """
        counts = [len(wave) // HOP for wave in waves]
        batch = torch.zeros(len(waves), HOP * max(counts) + 2 * PAD)
        for row, wave in zip(batch, waves, strict=True):
            row[: len(wave) + 2 * PAD] = torch.from_numpy(prepare(wave))
        first, features = self._forward(batch.to(self._device), torch.tensor(counts, device=self._device), layer)
        return [
            (one[:count].double().mean(0).float().cpu().numpy(), other[:count].float().cpu().numpy())
            for one, other, count in zip(first, features, counts, strict=True)
        ]

    @torch.inference_mode()
    def _forward(self, batch: Tensor, counts: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """float [B, 320T + 80] and frames per row -> states after the first and the given layer, [B, T, width] each."""
        network, encoder = self._network, self._network.encoder
        x = network.feature_projection(network.feature_extractor(batch.to(self._type)).transpose(1, 2))
        inside = torch.arange(x.shape[1], device=x.device) < counts[:, None]
        mask = None
        if not inside.all():
            x = x * inside[..., None]  # beyond a clip's end the positional convolution sees zeros, as it does alone
            mask = torch.zeros(inside.shape, dtype=x.dtype, device=x.device)
            mask = mask.masked_fill(~inside, torch.finfo(x.dtype).min)[:, None, None]
            mask = mask.expand(-1, 1, x.shape[1], -1)
        x = x + encoder.pos_conv_embed(x)
        first = x
        for number, block in enumerate(encoder.layers[:layer]):
            out = block(x, attention_mask=mask)
            x = out[0] if isinstance(out, tuple) else out
            first = x if number == 0 else first
        return first, encoder.layer_norm(x) if layer == self.layers else x


def prepare(wave: Floats) -> Floats:
    """A clip's sound as the network takes it: 40 samples reflected at each end, then zero mean and unit variance over
    all of it; float32 [N + 80]."""
    padded = np.pad(wave.astype(np.float64), PAD, mode="reflect")
    return ((padded - padded.mean()) / np.sqrt(padded.var() + EPS)).astype(np.float32)


def find_hubert(folder: Path | None) -> Path:
    """The checkpoint's file, as safetensors or as published; see `find_checkpoint`."""
    for place in (folder, user_cache() / FOLDER):
        if place is not None and (place / SAFE).is_file():
            return checked(CHECKPOINT, place / SAFE)
        if place is not None and (place / CHECKPOINT.file).is_file():
            break
    return find_checkpoint(CHECKPOINT, folder)


def load_hubert(
    path: Path, device: torch.device, precision: Precision = "float32", shape: HubertConfig | None = None
) -> HubertEncoder:
    """The encoder with the weights of a file that transformers saved for HuBERT, bare or below a task's head.

    Args:
        shape: of the network, where it is not `large`.

    Raises:
        UserError: see `load_tensors` and `load_strict`.
    """
    with torch.device("meta"):  # its random start is of no use and takes longer than reading the file
        network = HubertModel(shape or large())
    network.to_empty(device="cpu")
    load_strict(network, _named(load_tensors(path, WHAT), network), path, WHAT)
    return HubertEncoder(network, device, precision)


_PREFIX = "hubert."
_WEIGHT_NORM = (("weight_g", "original0"), ("weight_v", "original1"))


def _named(tensors: dict[str, Tensor], network: HubertModel) -> dict[str, Tensor]:
    """Tensors under the names that the network has here: weight norm changed its names with torch 2.0."""
    if any(name.startswith(_PREFIX) for name in tensors):
        tensors = {name.removeprefix(_PREFIX): t for name, t in tensors.items() if name.startswith(_PREFIX)}
    own = network.state_dict()
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for old, new in _WEIGHT_NORM:
            other = re.sub(rf"\.{old}$", f".parametrizations.weight.{new}", name)
            if other == name:
                other = name.replace(f".parametrizations.weight.{new}", f".{old}")
            name = other if other in own and name not in own else name
        if name != "masked_spec_embed":  # stands for masked frames in training
            found[name] = tensor.float()
    return found

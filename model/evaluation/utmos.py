"""UTMOS22, strong learner (Saeki et al. 2022): predicted naturalness, 1 to 5.

wav2vec 2.0 Base, then a bidirectional LSTM that is also told which listener and data set to answer for (both fixed in
the public file), then two linear layers per frame; the mean over frames is scaled to the range of opinion scores. The
file is that of tarepan/SpeechMOS, `utmos22_strong_step7459_v1.pt`, without phoneme encoder.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.networks.weights import load_strict, load_tensors

WHAT = "UTMOS"
CONVOLUTIONS = ((10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2))
"""Kernel and stride of each layer of the feature extractor: a frame every 320 samples."""
SHORTEST = 400
"""Samples of the first frame."""
TAPS, GROUPS = 128, 16


class Utmos(nn.Module):
    """The network, with the tensor names of the public file; defaults are its sizes.

    Args:
        features: channels of the convolutions.
        width, layers, heads, ffn: of the Transformer.
        told: length of each of the two fixed embeddings.
        hidden, head: of the LSTM in each direction, and of the first linear layer behind it.
    """

    def __init__(
        self,
        features: int = 512,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        ffn: int = 3072,
        told: int = 128,
        hidden: int = 512,
        head: int = 2048,
    ) -> None:
        super().__init__()
        self.wav2vec2 = Wav2Vec2(features, width, layers, heads, ffn)
        self.domain_emb = nn.Parameter(torch.zeros(1, told))
        self.judge_emb = nn.Parameter(torch.zeros(1, told))
        self.blstm = nn.LSTM(width + 2 * told, hidden, batch_first=True, bidirectional=True)
        self.projection = nn.Sequential(nn.Linear(2 * hidden, head), nn.ReLU(), nn.Linear(head, 1))

    def forward(self, wave: Tensor) -> Tensor:
        """float [B, N], 16 kHz, raw level, N at least 400 -> score [B]."""
        x = self.wav2vec2(wave)
        told = torch.cat([self.domain_emb, self.judge_emb], 1)[:, None].expand(*x.shape[:2], -1)
        return self.projection(self.blstm(torch.cat([x, told], 2))[0])[..., 0].mean(1) * 2 + 3


class Wav2Vec2(nn.Module):
    """wav2vec 2.0 (Baevski et al. 2020) as Base has it: group norm in the first convolution, layers that normalise
    after each residual. float [B, N] -> [B, T, width]."""

    def __init__(self, features: int, width: int, layers: int, heads: int, ffn: int) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for place, (kernel, stride) in enumerate(CONVOLUTIONS):
            parts: list[nn.Module] = [nn.Conv1d(features if place else 1, features, kernel, stride, bias=False)]
            parts += [nn.Identity()]  # keeps the place of the file's dropout
            parts += [nn.GELU()] if place else [nn.GroupNorm(features, features), nn.GELU()]
            blocks.append(nn.Sequential(*parts))
        self.feature_extractor = nn.ModuleDict({"conv_layers": nn.ModuleList(blocks)})
        self.layer_norm = nn.LayerNorm(features)
        self.post_extract_proj = nn.Linear(features, width)
        self.encoder = _Encoder(width, layers, heads, ffn)

    def forward(self, wave: Tensor) -> Tensor:
        x = wave[:, None]
        for block in self.feature_extractor["conv_layers"].children():
            x = block(x)
        return self.encoder(self.post_extract_proj(self.layer_norm(x.transpose(1, 2))))


class _Encoder(nn.Module):
    def __init__(self, width: int, layers: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.pos_conv = nn.ModuleList([nn.Conv1d(width, width, TAPS, padding=TAPS // 2, groups=GROUPS)])
        self.layer_norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(_Layer(width, heads, ffn) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        # An even kernel gives one frame too many, at the end.
        places = self.pos_conv[0](x.transpose(1, 2))[..., :-1].transpose(1, 2)
        x = self.layer_norm(x + F.gelu(places))
        for layer in self.layers:
            x = layer(x)
        return x


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.heads = heads
        self.self_attn = nn.ModuleDict(
            {name: nn.Linear(width, width) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
        )
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, ffn), nn.Linear(ffn, width)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        split = (self.self_attn[name](x).unflatten(2, (self.heads, -1)).transpose(1, 2) for name in _QKV)
        attended = F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
        x = self.self_attn_layer_norm(x + self.self_attn["out_proj"](attended))
        return self.final_layer_norm(x + self.fc2(F.gelu(self.fc1(x))))


_QKV = ("q_proj", "k_proj", "v_proj")


def load_public(network: Utmos, path: Path) -> None:
    """Fill a network from the public file. Its weight norm of the positional convolution is multiplied out.

    Raises:
        UserError: the file cannot be read, or is another one.
    """
    tensors = load_tensors(path, WHAT)
    place = "wav2vec2.encoder.pos_conv.0.weight"
    if {f"{place}_g", f"{place}_v"} <= tensors.keys():
        size, direction = tensors.pop(f"{place}_g"), tensors.pop(f"{place}_v")
        tensors[place] = direction * (size / direction.norm(dim=(0, 1), keepdim=True))
    tensors.pop("wav2vec2.mask_emb", None)  # serves training alone
    load_strict(network, tensors, path, WHAT)


class UtmosScore:
    """Scores by UTMOS; figure `utmos`.

    Raises:
        UserError: see `load_public`.
    """

    key = "utmos"

    def __init__(self, path: Path, device: torch.device | str = "cpu") -> None:
        network = Utmos()
        load_public(network, path)
        self._network, self._device = network.eval().to(device), device

    @torch.inference_mode()
    def __call__(self, wave: NDArray[np.float32]) -> float:
        """Score of a mono 16 kHz signal [N]; zeros behind one shorter than the network's first frame (25 ms)."""
        padded = np.pad(wave, (0, max(SHORTEST - len(wave), 0)))
        return float(self._network(torch.from_numpy(padded)[None].to(self._device, torch.float32))[0])

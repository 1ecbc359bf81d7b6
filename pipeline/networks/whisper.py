"""The encoder of Whisper (Radford et al. 2022) in plain torch, every block's output exposed, on our 50 Hz frame grid.

Weights come from a CTranslate2 file. Whisper's own log-mel and convolutions put output frame i on input frame 2i;
padding by 40 samples left and 200 right centres input frame j on sample 160(j + 1), so that output frame k lies on
sample 320k + 160 like mel frame k, and 640F samples give exactly 2F frames.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.networks.ctranslate2 import find_weights, read_ctranslate2
from pipeline.networks.device import Precision, compute_type
from shards.errors import UserError
from shards.mel import hann, mel_filters
from shards.schema import SAMPLE_RATE

N_FFT, HOP, BINS = 400, 160, 80
PAD_LEFT, PAD_RIGHT = 40, 200
EDGE = 100
"""Frames (2 s) that a window of a long clip gives away at each inner edge, where its context is cut."""


class Block(nn.Module):
    """Pre-norm transformer block: self-attention and a four times wider GELU layer, each with a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.ffn_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """float [B, T, width] -> the same shape."""
        batch, time, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, time, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, time, width))
        return x + self.down(F.gelu(self.up(self.ffn_norm(x))))


class WhisperEncoder(nn.Module):
    """Convolutions, fixed positions, pre-norm blocks.

    Attributes:
        width: channels of every state; layers: blocks.
        positions: rows of the positional table, the longest window in frames.
        budget, waste: see `SpeechEncoder`. Each clip is encoded alone: the network knows no mask, and is small.
    """

    position: Tensor
    budget, waste = 1, 0.0

    def __init__(self, width: int, layers: int, heads: int, positions: int) -> None:
        super().__init__()
        self.width, self.layers, self.positions = width, layers, positions
        self.conv1 = nn.Conv1d(BINS, width, 3, padding=1)
        self.conv2 = nn.Conv1d(width, width, 3, stride=2, padding=1)
        self.register_buffer("position", torch.zeros(positions, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, mel: Tensor, last: int | None = None) -> list[Tensor]:
        """Hidden states for a Whisper log-mel.

        Args:
            mel: float [B, 80, 2T], T at most `positions`.
            last: stop after this block (1-based); None runs all.

        Returns:
            float [B, T, width] each: index 0 enters the first block, index i leaves block i (before the final `norm`).
        """
        x = F.gelu(self.conv2(F.gelu(self.conv1(mel)))).transpose(1, 2)
        states = [x + self.position[: x.shape[1]]]
        for block in self.blocks[:last]:
            states.append(block(states[-1]))
        return states

    @torch.inference_mode()
    def states(self, wave: NDArray[np.float32], last: int | None = None) -> list[NDArray[np.float32]]:
        """Hidden states of a mono 16 kHz signal [320T] in [-1, 1]: list of float32 [T, width], indexed as in `forward`.

        A clip longer than the positional table goes through overlapping windows (see `windows`).
        """
        mel = torch.from_numpy(whisper_mel(wave).T)[None].to(self.position)
        parts = []
        for start, stop, low, high in windows(mel.shape[2] // 2, self.positions):
            states = self(mel[:, :, 2 * start : 2 * stop], last)
            parts.append([state[0, low - start : high - start] for state in states])
        return [torch.cat(pieces).float().cpu().numpy() for pieces in zip(*parts, strict=True)]

    def encode(
        self, waves: Sequence[NDArray[np.float32]], layer: int
    ) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """Per clip, float32 [640F]: the first block's mean over time, float32 [width], and a block's output (1-based,
        before the final norm), float32 [2F, width]."""
        found = []
        for wave in waves:
            states = self.states(wave, layer)
            found.append((states[1].mean(axis=0, dtype=np.float64).astype(np.float32), states[layer]))
        return found


def windows(frames: int, longest: int, edge: int = EDGE) -> list[tuple[int, int, int, int]]:
    """Cut `frames` into windows of at most `longest`: (start, stop, low, high), of which [low, high) is kept.

    Neighbours overlap by at least 2 `edge` frames and give away `edge` at each cut; the last window ends with the clip
    and is full length, so every kept frame has at least `edge` frames of context on both sides or the clip's end.
    """
    if frames <= longest:
        return [(0, frames, 0, frames)]
    cuts = []
    low = 0
    for start in range(0, frames, longest - 2 * edge):
        start = min(start, frames - longest)
        stop = start + longest
        high = frames if stop == frames else stop - edge
        cuts.append((start, stop, low, high))
        if stop == frames:
            break
        low = high
    return cuts


def whisper_mel(wave: NDArray[np.float32]) -> NDArray[np.float32]:
    """Whisper's input features, framed for our grid: float32 [N // 160, 80].

    Power spectra (periodic Hann 400, hop 160) through 80 Slaney filters; log10 with a floor of 1e-10 and of 8 decades
    below the clip's loudest value; (x + 4) / 4. Frame j is centred on sample 160(j + 1).

    Raises:
        ValueError: fewer than 201 samples, too short to be reflected.
    """
    if wave.ndim != 1 or len(wave) <= PAD_RIGHT:
        raise ValueError(f"speech features need a mono signal of more than {PAD_RIGHT} samples, got {wave.shape}")
    padded = np.pad(wave.astype(np.float64), (PAD_LEFT, PAD_RIGHT), mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, N_FFT)[::HOP]
    power = np.abs(np.fft.rfft(frames * hann(N_FFT), axis=1)) ** 2
    logs = np.log10(np.maximum(power @ _filters().T, 1e-10))
    return ((np.maximum(logs, logs.max() - 8) + 4) / 4).astype(np.float32)


@cache
def _filters() -> NDArray[np.float64]:
    return mel_filters("slaney", N_FFT, BINS, SAMPLE_RATE)


_PARTS = {
    "self_attention/layer_norm": "attention_norm",
    "self_attention/linear_0": "qkv",
    "self_attention/linear_1": "out",
    "ffn/layer_norm": "ffn_norm",
    "ffn/linear_0": "up",
    "ffn/linear_1": "down",
    "layer_norm": "norm",
}
_LEAVES = {"gamma": "weight", "beta": "bias"}


def _parameter(name: str) -> str:
    """Name in our module of a tensor of the file: layer_0/ffn/linear_0/weight -> blocks.0.up.weight."""
    if name == "position_encodings/encodings":
        return "position"
    part, _, leaf = name.rpartition("/")
    block = re.match(r"layer_(\d+)/", part)
    part = part[block.end() :] if block else part
    return (f"blocks.{block[1]}." if block else "") + f"{_PARTS.get(part, part)}.{_LEAVES.get(leaf, leaf)}"


def load_encoder(
    path: Path | None = None, device: torch.device | str = "cpu", precision: Precision = "float32"
) -> WhisperEncoder:
    """The encoder with the weights of a CTranslate2 Whisper file (`find_weights` by default), eval mode.

    Raises:
        UserError: see `read_ctranslate2`; also where tensors are missing, quantised, or of other shapes.
    """
    path = path or find_weights()
    tensors = read_ctranslate2(path)
    heads = tensors.pop("num_heads", None)
    position = tensors.get("position_encodings/encodings")
    if heads is None or position is None or any(t.dtype.kind != "f" for t in tensors.values()):
        raise UserError(f"speech encoder {path}: expected a float16 or float32 encoder with num_heads and positions")
    state = {_parameter(name): torch.from_numpy(value.astype(np.float32)) for name, value in tensors.items()}
    layers = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    encoder = WhisperEncoder(position.shape[1], layers, int(heads), position.shape[0])
    try:
        encoder.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"speech encoder {path}: {' '.join(str(error).split())}") from None
    return encoder.to(device, compute_type(precision)).eval().requires_grad_(False)

"""Mean opinion scores that a network predicts without a reference: DistillMOS where UTMOS is not at hand.

DistillMOS (Stahl and Gamper 2025) with the weights that the package distillmos carries: compressed spectra of
7.68 s windows through convolutions, a Transformer and attention pooling. It is trained on other ratings than UTMOS, so
values of the two do not compare.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from model.evaluation.packages import PackageFile
from pipeline.networks.weights import load_strict, load_tensors

FILE = PackageFile("DistillMOS", "distillmos", "distillmos", "0.9.1", "weights/distill_mos_v7.pt", "--no-deps")
N_FFT, HOP = 320, 160
SAMPLES = 122_880
"""Length of the network's input."""
BATCH = 8
"""Windows at a time; long sound would not fit in memory whole."""
STRIDE = 16_000
"""Windows of longer sound are at most this many samples apart."""
FRAMES = 384
WIDTH, HEADS, LAYERS = 200, 8, 7
CHANNELS = (64, 64, 128, 256, 256, 256)


class DistillMosNet(nn.Module):
    """The network, with the tensor names of the public file."""

    def __init__(self) -> None:
        super().__init__()
        convolutions: list[nn.Module] = []
        for place, (inner, outer) in enumerate(zip((2, *CHANNELS[:-1]), CHANNELS, strict=True)):
            stride = (2 if place else 1, 2 if place == len(CHANNELS) - 1 else 1)
            convolutions += [nn.Conv2d(inner, outer, 3, stride, padding=(0, 1)), nn.LeakyReLU(0.1)]
        self.cnn = nn.ModuleDict({"cnn": nn.Sequential(*convolutions)})
        self.transformer_pool_attn = _Judge(4 * CHANNELS[-1])

    def forward(self, wave: Tensor) -> Tensor:
        """float [B, 122880], any level -> score [B], 1 to 5."""
        wave = wave / (wave.abs().amax(1, keepdim=True) + 1e-8)
        padded = F.pad(wave[:, None], ((N_FFT - HOP) // 2,) * 2, mode="reflect")[:, 0]
        window = torch.hann_window(N_FFT, device=wave.device)
        spectrum = torch.stft(padded, N_FFT, HOP, window=window, center=False, return_complex=True)
        size = spectrum.abs().clamp_min(1e-12)
        compressed = torch.view_as_real(spectrum * size ** (0.3 - 1)).permute(0, 3, 1, 2)
        return 1 + 4 * self.transformer_pool_attn(self.cnn["cnn"](compressed).flatten(1, 2).transpose(1, 2))


class _Judge(nn.Module):
    """Features float [B, 384, C] -> score [B], 0 to 1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm_input = nn.BatchNorm1d(channels)
        self.transformer = _Transformer(channels)
        self.norm_trans = nn.BatchNorm1d(WIDTH)
        self.pool = _Pool()

    def forward(self, x: Tensor) -> Tensor:
        x = self.transformer(self.norm_input(x.transpose(1, 2)))
        return torch.sigmoid(self.pool(self.norm_trans(x.transpose(1, 2)).transpose(1, 2)))


class _Transformer(nn.Module):
    """A second normalisation, projection, fixed positions, post-norm layers: [B, C, 384] -> [B, 384, 200]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels)
        self.linear_proj = nn.Linear(channels, WIDTH)
        self.position_encoding = nn.Module()
        self.position_encoding.register_buffer("pe", torch.zeros(1, FRAMES, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, dropout=0.0, batch_first=True)
        self.transformer_encoder = nn.TransformerEncoder(layer, LAYERS)

    def forward(self, x: Tensor) -> Tensor:
        return self.transformer_encoder(self.linear_proj(self.norm(x).transpose(1, 2)) + self.position_encoding.pe)


class _Pool(nn.Module):
    """Attention pooling: [B, 384, 200] -> [B]."""

    def __init__(self) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, 1)
        self.linear3 = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        share = torch.softmax(self.linear2(torch.relu(self.linear1(x))), 1)
        return self.linear3((share * x).sum(1))[:, 0]


class DistillMos:
    """Scores by DistillMOS; figure `distillmos`.

    Raises:
        UserError: the package is missing, or its file is another one.
    """

    key = "distillmos"

    def __init__(self, device: torch.device | str = "cpu") -> None:
        path = FILE.path()
        network = DistillMosNet()
        load_strict(network, load_tensors(path, FILE.what), path, FILE.what)
        self._network, self._device = network.eval().to(device), device

    @torch.inference_mode()
    def __call__(self, wave: NDArray[np.float32]) -> float:
        """Score of a mono 16 kHz signal [N], N at least 1: zeros behind a short one, the mean over windows of a long
        one, which are spread evenly from its beginning to its end."""
        over = max(len(wave) - SAMPLES, 0)
        padded = np.pad(wave, (0, max(SAMPLES - len(wave), 0)))
        starts = (np.linspace(0, 1, math.ceil(over / STRIDE) + 1) * over).astype(int)
        windows = [padded[start : start + SAMPLES] for start in starts]
        batches = (np.stack(windows[first : first + BATCH]) for first in range(0, len(windows), BATCH))
        scores = [self._network(torch.from_numpy(batch).to(self._device, torch.float32)) for batch in batches]
        return float(torch.cat(scores).mean())

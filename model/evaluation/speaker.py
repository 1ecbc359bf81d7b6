"""Similarity of voices: the cosine of GE2E speaker embeddings (Wan et al. 2018).

The network of "Real-Time Voice Cloning" with the weights that the package Resemblyzer carries: power mels of 40 bins
(25 ms every 10 ms), three LSTM layers of 256, a linear layer with ReLU, unit length; windows of 1.6 s that overlap by
half are averaged. Before, quiet sound is raised to -30 dBFS and what WebRTC's detector calls no voice is cut out.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation
from torch import Tensor, nn

from model.evaluation.packages import PackageFile
from pipeline.networks.weights import load_strict, load_tensors
from shards.mel import hann, mel_filters
from shards.schema import SAMPLE_RATE

FILE = PackageFile("speaker similarity", "Resemblyzer", "resemblyzer", "0.1.4", "pretrained.pt", "--no-deps")
N_FFT, HOP, BINS = 400, 160, 40
WINDOW = 160
"""Mel frames of a window, 1.6 s."""
STEP = 80
"""Mel frames from window to window: 1.25 windows a second."""
COVERED = 0.75
"""Share of the last window that sound must fill; one that has less is dropped, unless it is the only one."""
LOUDNESS = -30.0
"""Level in dBFS (RMS) to which quieter sound is raised."""
VOICE = 480
"""Samples (30 ms) that the voice detector decides about at a time."""
SHORTEST = 0.4
"""Seconds of voice below which a clip has no embedding: most of the window would be padding."""


class GE2E(nn.Module):
    """The speaker encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(BINS, 256, 3, batch_first=True)
        self.linear = nn.Linear(256, 256)

    def forward(self, mels: Tensor) -> Tensor:
        """float [B, 160, 40] -> float [B, 256], unit length, no element below zero."""
        _, (hidden, _) = self.lstm(mels)
        return nn.functional.normalize(torch.relu(self.linear(hidden[-1])), dim=1)


class Speaker:
    """Embeddings of voices.

    Raises:
        UserError: the package is missing, or its file is another one.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        network = GE2E()
        path = FILE.path()
        tensors = load_tensors(path, FILE.what, ("model_state",))
        load_strict(network, {k: v for k, v in tensors.items() if not k.startswith("similarity_")}, path, FILE.what)
        self._network = network.eval().to(device)
        self._device = device

    def embed(self, wave: NDArray[np.float32]) -> NDArray[np.float32] | None:
        """Embedding of a mono 16 kHz signal [N] in -1..1: float32 [256], unit length.

        None where less than `SHORTEST` of it is voice.
        """
        shortest = SHORTEST * SAMPLE_RATE
        if len(wave) < shortest or len(voice := voiced(louder(wave))) < shortest:
            return None
        return self.embed_voice(voice)

    @torch.inference_mode()
    def embed_voice(self, voice: NDArray[np.float32]) -> NDArray[np.float32]:
        """Embedding of sound that is voice throughout."""
        starts = _windows(len(voice))
        length = (starts[-1] + WINDOW) * HOP
        mel = power_mel(np.pad(voice, (0, max(length - len(voice), 0))))
        batch = np.stack([mel[start : start + WINDOW] for start in starts])
        mean = self._network(torch.from_numpy(batch).to(self._device)).mean(0)
        return np.asarray(nn.functional.normalize(mean, dim=0).cpu().numpy(), np.float32)


def louder(wave: NDArray[np.float32]) -> NDArray[np.float32]:
    """Raise a signal [N], N at least 1, to -30 dBFS where it is quieter; digital silence stays."""
    level = float(np.sqrt(np.mean(wave.astype(np.float64) ** 2)))
    gain = 10 ** (LOUDNESS / 20) / level if level > 0 else 1.0
    return (wave * gain).astype(np.float32) if gain > 1 else wave


def voiced(wave: NDArray[np.float32]) -> NDArray[np.float32]:
    """What is left of a signal [N] of 30 ms or more without its long pauses, by WebRTC's detector at its strictest.

    Decisions every 30 ms are averaged over eight of them; what is voice then keeps three more on either side.
    """
    import webrtcvad

    wave = wave[: len(wave) // VOICE * VOICE]
    pcm = np.round(np.clip(wave, -1, 1) * 32767).astype("<i2")
    detector = webrtcvad.Vad(3)
    flags = [detector.is_speech(part.tobytes(), SAMPLE_RATE) for part in pcm.reshape(-1, VOICE)]
    sums = np.cumsum(np.concatenate([np.zeros(4), flags, np.zeros(4)]))
    smooth = np.round((sums[8:] - sums[:-8])[: len(flags)] / 8).astype(bool)
    return wave[np.repeat(binary_dilation(smooth, np.ones(7)), VOICE)]


def power_mel(wave: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mel spectrum of powers, no logarithm: float32 [N // 160 + 1, 40], frame k centred on sample 160k."""
    padded = np.pad(wave.astype(np.float64), N_FFT // 2)
    frames = np.lib.stride_tricks.sliding_window_view(padded, N_FFT)[::HOP]
    power = np.abs(np.fft.rfft(frames * hann(N_FFT), axis=1)) ** 2
    return (power @ mel_filters("slaney", N_FFT, BINS).T).astype(np.float32)


def _windows(samples: int) -> list[int]:
    """First mel frames of the windows over a signal."""
    frames = -(-(samples + 1) // HOP)
    starts = list(range(0, max(1, frames - WINDOW + STEP + 1), STEP))
    if len(starts) > 1 and samples - starts[-1] * HOP < COVERED * WINDOW * HOP:
        starts.pop()
    return starts

"""Fundamental frequency by pYIN (Mauch and Dixon 2014)."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from pipeline.stage import Fields, Item, Stage
from shards.config import Config
from shards.mel import N_FFT, PAD, from_pcm
from shards.schema import HOP, SAMPLE_RATE

Backend = Literal["fast", "librosa"]


NARROWEST = 1.7
"""Least ratio of the bounds: pYIN wants at least the 91 bins, ten a semitone, that its pitch may cross in a frame."""


class PitchConfig(Config):
    """Range of the search in Hz. The lower bound must leave two periods in the window of 1280 samples."""

    fmin: float = Field(65.0, gt=2 * SAMPLE_RATE / N_FFT)
    fmax: float = Field(600.0, le=SAMPLE_RATE / 4)
    backend: Backend = "fast"
    """`fast` is our own pYIN; `librosa` is the reference that it equals bit for bit, many times slower."""

    @model_validator(mode="after")
    def _ordered(self) -> PitchConfig:
        if self.fmin >= self.fmax:
            raise ValueError(f"pitch.fmin {self.fmin:g} must be below pitch.fmax {self.fmax:g}")
        if self.fmax < NARROWEST * self.fmin:
            raise ValueError(f"pitch.fmax {self.fmax:g} must be at least {NARROWEST:g} times pitch.fmin {self.fmin:g}")
        return self


class Pitch(Stage[PitchConfig]):
    """Reads `wav`, writes `pitch`, float32 [2F] in Hz, NaN where unvoiced (a whole clip may be)."""

    name: ClassVar[str] = "pitch"
    version: ClassVar[int] = 1  # both backends': they agree in every bit
    reads: ClassVar[tuple[str, ...]] = ("wav",)
    writes: ClassVar[tuple[str, ...]] = ("pitch",)

    def setup(self) -> None:
        """Have pYIN's inner loops compiled, once per machine, and load them."""
        from pipeline.compiled import use_compiled_loops

        backend = self.config.backend
        modules = ["pipeline.pyin", "pipeline.pyin_loops"] if backend == "fast" else ["librosa"]
        use_compiled_loops(f"from pipeline.stages.pitch import warm_up; warm_up({backend!r})", modules)
        warm_up(backend)

    def run(self, item: Item) -> Fields:
        """Pitch of one clip."""
        config = self.config
        return {"pitch": track_pitch(from_pcm(item.fields["wav"]), config.fmin, config.fmax, config.backend)}


def track_pitch(wave: NDArray[np.float32], fmin: float, fmax: float, backend: Backend = "fast") -> NDArray[np.float32]:
    """pYIN on a mono 16 kHz signal [N]: float32 [N // 320] in Hz, NaN where unvoiced.

    480 zeros on both sides and no centring put frame k on samples around 320k + 160, where mel frame k lies; the
    library's own centring gives one frame more, half a hop early.
    """
    padded = np.pad(wave, PAD)
    if backend == "fast":
        from pipeline.pyin import pyin

        hertz, _, _ = pyin(padded, fmin=fmin, fmax=fmax, sr=SAMPLE_RATE, frame_length=N_FFT, hop_length=HOP)
    else:
        import librosa

        hertz, _, _ = librosa.pyin(
            padded, fmin=fmin, fmax=fmax, sr=SAMPLE_RATE, frame_length=N_FFT, hop_length=HOP, center=False
        )
    return hertz.astype(np.float32)


def warm_up(backend: Backend) -> None:
    """Track a short tone, which makes numba compile or load every loop of pYIN."""
    tone = np.sin(np.arange(1600) * (2 * np.pi * 150 / SAMPLE_RATE)).astype(np.float32)
    track_pitch(tone, PitchConfig().fmin, PitchConfig().fmax, backend)

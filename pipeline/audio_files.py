"""Folders of audio, such as LJ Speech: what centroids of speech units are fitted on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from math import ceil, gcd
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.errors import UserError
from shards.schema import SAMPLE_RATE, SAMPLES_PER_FRAME

SUFFIXES = {".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".au", ".w64"}
PIECE_SECONDS = 30
"""Longer files go through the encoder in pieces: attention grows with the square of the length."""
SHORTEST = SAMPLES_PER_FRAME * 5
"""Samples (0.2 s) below which a piece is not used."""


def list_audio(folder: Path) -> list[Path]:
    """Audio files below a folder, by name; of a folder in LJ Speech's layout, those in `wavs`.

    Raises:
        UserError: no such folder, or no audio file in it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name one with audio files, e.g. LJSpeech-1.1")
    root = folder / "wavs" if (folder / "metadata.csv").is_file() and (folder / "wavs").is_dir() else folder
    found = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        raise UserError(f"{folder}: no audio file ({' '.join(sorted(SUFFIXES))})")
    return found


def draw(paths: Sequence[Path], fraction: float, seed: int) -> list[Path]:
    """A part of the files, at least one, chosen by a hash of seed and name, so that neither order nor place counts."""
    ranked = sorted(paths, key=lambda path: hashlib.sha256(f"{seed} {path.name}".encode()).digest())
    return ranked[: ceil(len(ranked) * fraction)]


def read_audio(path: Path) -> Iterator[NDArray[np.float32]]:
    """A file as mono 16 kHz pieces, float32 [640F], of 30 s at most; what is left over at the end is dropped.

    Channels are averaged; other rates are resampled by a polyphase filter.

    Raises:
        OSError: the file cannot be decoded.
    """
    import soundfile
    from scipy.signal import resample_poly

    try:
        with soundfile.SoundFile(path) as sound:
            rate, block = sound.samplerate, PIECE_SECONDS * sound.samplerate
            while len(samples := sound.read(block, dtype="float32", always_2d=True)):
                mono = samples.mean(axis=1)
                if rate != SAMPLE_RATE:
                    common = gcd(rate, SAMPLE_RATE)
                    mono = resample_poly(mono, SAMPLE_RATE // common, rate // common).astype(np.float32)
                piece = mono[: len(mono) // SAMPLES_PER_FRAME * SAMPLES_PER_FRAME]
                if len(piece) >= SHORTEST and np.isfinite(piece).all():
                    yield piece
    except soundfile.SoundFileError as error:
        raise OSError(f"{path}: {error}") from None

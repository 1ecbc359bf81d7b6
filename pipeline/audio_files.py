"""Folders of audio, such as LJ Speech: what centroids of speech units are fitted on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import sha256
from math import ceil, gcd
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.errors import UserError
from shards.schema import SAMPLE_RATE, SAMPLES_PER_FRAME

AUDIO = {".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".au", ".w64"}
MEDIA = {".m4a", ".mp4", ".mov", ".webm", ".mkv", ".mka"}
"""Containers that go through the same decoder as clips."""
SUFFIXES = AUDIO | MEDIA
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


def draw(paths: Sequence[Path], fraction: float, seed: int, root: Path) -> list[Path]:
    """A part of the files, at least one, chosen by a hash of seed and path below `root`, so that neither order nor
    where the folder lies counts."""
    ranked = sorted(paths, key=lambda path: sha256(f"{seed} {path.relative_to(root).as_posix()}".encode()).digest())
    return ranked[: ceil(len(ranked) * fraction)]


def read_audio(path: Path) -> Iterator[NDArray[np.float32]]:
    """A file as mono 16 kHz pieces, float32 [640F], of 30 s at most; what is left over at the end is dropped.

    Channels are mixed by the rule for clips (`pipeline.sound.mix`), piece by piece; other rates are resampled by a
    polyphase filter. A file in `MEDIA` is held whole while it is read.

    Raises:
        OSError: the file cannot be decoded.
    """
    for samples in _containers(path) if path.suffix.lower() in MEDIA else _files(path):
        piece = samples[: len(samples) // SAMPLES_PER_FRAME * SAMPLES_PER_FRAME]
        if len(piece) >= SHORTEST and np.isfinite(piece).all():
            yield piece


def _files(path: Path) -> Iterator[NDArray[np.float32]]:
    import soundfile
    from scipy.signal import resample_poly

    from pipeline.sound import mean, mix

    try:
        with soundfile.SoundFile(path) as sound:
            rate, block = sound.samplerate, PIECE_SECONDS * sound.samplerate
            # A file without a layout: as WAV orders its channels, where there are those of a surround mix.
            names = _SURROUND if sound.channels == len(_SURROUND) else tuple(map(str, range(sound.channels)))
            while len(samples := sound.read(block, dtype="float32", always_2d=True)):
                channels = np.ascontiguousarray(samples.T)
                mono = mean(channels, mix([channels], names))
                if rate != SAMPLE_RATE:
                    common = gcd(rate, SAMPLE_RATE)
                    mono = resample_poly(mono, SAMPLE_RATE // common, rate // common).astype(np.float32)
                yield mono
    except soundfile.SoundFileError as error:
        raise OSError(f"{path}: {error}") from None


_SURROUND = ("FL", "FR", "FC", "LFE", "BL", "BR")


def _containers(path: Path) -> Iterator[NDArray[np.float32]]:
    from pipeline.sound import mean, mix, stretches
    from pipeline.stage import Reject

    block = PIECE_SECONDS * SAMPLE_RATE
    try:
        for _, names, samples in stretches(str(path)):
            for at in range(0, samples.shape[1], block):
                piece = samples[:, at : at + block]
                yield mean(piece, mix([piece], names))
    except Reject as error:
        raise OSError(str(error)) from None

"""Sound of a file to be judged: wav, flac, mp3 or any video, at any rate, as mono 16 kHz."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.errors import UserError
from shards.schema import SAMPLE_RATE, SAMPLES_PER_FRAME


@dataclass(frozen=True)
class Sound:
    """What is judged.

    Attributes:
        samples: float32 [N], mono, 16 kHz, within -1..1; of a video no longer than its picture (640 per frame).
        seconds: length of the sound as the file has it, before that cut.
        video_frames: at 25 Hz, where the file is a video.
        peak: largest magnitude before samples beyond full scale were clipped, as a player does.
    """

    samples: NDArray[np.float32]
    seconds: float
    video_frames: int | None = None
    peak: float = 0.0


def load_sound(path: str | Path) -> Sound:
    """Read a file. Channels are mixed by the rule for clips (`pipeline.sound.mix`), other rates resampled.

    Sound of a video starts at its first frame, so that pictures of two files lie on each other.

    Raises:
        UserError: the file is missing, cannot be decoded, holds no sound, or samples that are not finite.
    """
    from pipeline.audio_files import AUDIO

    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    samples, frames = (_file(path), None) if path.suffix.lower() in AUDIO else _container(path)
    if not len(samples):
        raise UserError(f"{path}: holds no sound")
    if not np.isfinite(samples).all():
        raise UserError(f"{path}: {int((~np.isfinite(samples)).sum())} samples are not finite numbers; write it anew")
    whole = samples if frames is None else samples[: frames * SAMPLES_PER_FRAME]
    peak = float(np.abs(whole).max(initial=0))
    return Sound(np.clip(whole, -1, 1).astype(np.float32), len(samples) / SAMPLE_RATE, frames, peak)


def _file(path: Path) -> NDArray[np.float32]:
    """A plain audio file, float32 [N] at 16 kHz."""
    import soundfile

    from pipeline.sound import mean, mix

    try:
        with open(path, "rb") as stream:  # soundfile itself takes no name that is not UTF-8
            read, rate = soundfile.read(stream, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError) as error:
        raise UserError(f"{path}: cannot be read as sound ({error})") from None
    channels = np.ascontiguousarray(read.T)
    mono = mean(channels, mix([channels], tuple(map(str, range(len(channels))))))
    if rate == SAMPLE_RATE:
        return mono
    from scipy.signal import resample_poly  # takes a second to load

    common = gcd(rate, SAMPLE_RATE)
    return np.asarray(resample_poly(mono, SAMPLE_RATE // common, rate // common), np.float32)


def _container(path: Path) -> tuple[NDArray[np.float32], int | None]:
    """Sound on the clock of the video, float32 [N] at 16 kHz, and its frames; None for a container without picture."""
    from pipeline.media import count_frames, decode_audio
    from pipeline.sound import mean, mix, stretches
    from pipeline.stage import Reason, Reject

    uri = str(path)
    try:
        try:
            return decode_audio(uri), count_frames(uri)
        except Reject as error:
            if error.reason is not Reason.NO_VIDEO:
                raise
        return np.concatenate([mean(piece, mix([piece], names)) for _, names, piece in stretches(uri)]), None
    except Reject as error:
        raise UserError(str(error)) from None

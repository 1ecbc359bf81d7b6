"""Sound of a clip: mono 16 kHz, as long as the picture to the sample."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pipeline.stage import Clip, Fields, Item, Reason, Reject, Stage
from shards.config import Config
from shards.schema import SAMPLES_PER_FRAME, VIDEO_RATE


class AudioConfig(Config):
    """Length rules and the silence threshold.

    Attributes:
        max_pad_frames: sound that ends at most this many video frames early is filled with zeros; beyond, rejected.
        max_difference_frames: sound and picture may differ by at most this many video frames.
        silence_dbfs: a clip whose sound (without its mean) has a lower RMS level, in dB of full scale, is rejected.
        max_seconds: longer clips are rejected before their sound is decoded.
    """

    max_pad_frames: float = Field(2.0, ge=0)
    max_difference_frames: float = Field(3.0, ge=0)
    silence_dbfs: float = Field(-60.0, lt=0)
    max_seconds: float = Field(60, gt=0, le=500)


class Audio(Stage[AudioConfig]):
    """Writes `wav`, int16 [640F] at the source's own level. Never stretches: real recordings run a packet long."""

    name: ClassVar[str] = "audio"
    version: ClassVar[int] = 2
    writes: ClassVar[tuple[str, ...]] = ("wav",)
    media: ClassVar[bool] = True

    def run(self, item: Item) -> Fields:
        """Decode, cut or pad, quantise.

        Raises:
            Reject: what decoding refuses; TOO_LONG; AUDIO_LENGTH; SILENT; TOO_SHORT without a video frame;
                UNREADABLE for samples that are not finite.
        """
        from pipeline import media

        clip = item.clip
        frames = media.count_frames(clip.uri, clip.start, clip.end)
        if frames > self.config.max_seconds * VIDEO_RATE:
            limit = f"audio.max_seconds = {self.config.max_seconds:g}"
            raise Reject(Reason.TOO_LONG, f"{clip.uri}: {frames / VIDEO_RATE:.0f} s, above {limit}; cut it in a table")
        sound = fit_length(media.decode_audio(clip.uri, clip.start, clip.end), frames, self.config, clip)
        if not np.isfinite(sound).all():
            raise Reject(Reason.UNREADABLE, f"{clip.uri}: the sound has samples that are not finite; re-encode it")
        level = level_dbfs(sound)
        if level < self.config.silence_dbfs:
            raise Reject(
                Reason.SILENT,
                f"{clip.uri}: the sound's level is {level:.1f} dBFS, below audio.silence_dbfs = "
                f"{self.config.silence_dbfs:g}; check the recording",
            )
        return {"wav": to_pcm(sound)}


def fit_length(sound: NDArray[np.float32], frames: int, config: AudioConfig, clip: Clip) -> NDArray[np.float32]:
    """Cut the sound [N] to 640 samples per video frame, or zero-pad it at its end.

    Raises:
        Reject: TOO_SHORT without frames; AUDIO_LENGTH where the difference is beyond the limits of `config`.
    """
    if frames < 1:
        raise Reject(Reason.TOO_SHORT, f"{clip.uri}: no video frame at 25 Hz; check the clip's start and end")
    wanted = frames * SAMPLES_PER_FRAME
    surplus = (len(sound) - wanted) / SAMPLES_PER_FRAME
    if abs(surplus) > config.max_difference_frames:
        rule = f"audio.max_difference_frames = {config.max_difference_frames:g}"
    elif -surplus > config.max_pad_frames:
        rule = f"audio.max_pad_frames = {config.max_pad_frames:g}"
    else:
        return np.pad(sound[:wanted], (0, max(0, wanted - len(sound))))
    raise Reject(
        Reason.AUDIO_LENGTH,
        f"{clip.uri}: the sound is {abs(surplus):.2f} video frames {'longer' if surplus > 0 else 'shorter'} than the "
        f"picture ({frames} frames), beyond {rule}; re-cut the clip or raise the limit",
    )


def level_dbfs(sound: NDArray[np.float32]) -> float:
    """RMS level of a signal in [-1, 1] without its mean, in dB re full scale; -inf for digital silence."""
    rms = float(np.std(sound, dtype=np.float64))
    return 20 * float(np.log10(rms)) if rms > 0 else -np.inf


def to_pcm(sound: NDArray[np.float32]) -> NDArray[np.int16]:
    """Float [-1, 1) to int16: times 32768, rounded to the nearest integer (halves to even), clipped."""
    return np.clip(np.rint(sound * np.float32(32768)), -32768, 32767).astype(np.int16)

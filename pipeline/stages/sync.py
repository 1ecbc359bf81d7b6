"""By how much the sound is late against the picture: a measurement, and a limit for those who want one."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from pipeline.stage import Fields, Item, Reason, Reject, Stage
from shards.config import Config
from shards.schema import SAMPLES_PER_FRAME, VIDEO_RATE

MAX_LAG = 15
"""Frames either way in which the offset is looked for."""


class SyncConfig(Config):
    """When a clip is refused for its offset.

    Attributes:
        max_offset_ms: clips whose sound is further from the picture are rejected; null measures and rejects none.
        min_confidence: an offset of lower confidence rejects nothing.
    """

    max_offset_ms: float | None = Field(None, ge=0)
    min_confidence: float = Field(0.5, ge=0, le=1)


class Sync(Stage[SyncConfig]):
    """Reads `face` and `wav`, writes `sync`: `offset_ms` (positive where the sound is late, null where nothing is to be
    told) and `confidence`."""

    name: ClassVar[str] = "sync"
    version: ClassVar[int] = 1
    reads: ClassVar[tuple[str, ...]] = ("face", "wav")
    writes: ClassVar[tuple[str, ...]] = ("sync",)

    def run(self, item: Item) -> Fields:
        """Offset of one clip.

        Raises:
            Reject: AUDIO_LENGTH where sound and picture differ in length; OUT_OF_SYNC beyond `max_offset_ms`.
        """
        from pipeline.speaker import mouth_motion, spectral_flux

        face, wav, uri = item.fields["face"], item.fields["wav"], item.clip.uri
        if len(wav) != len(face) * SAMPLES_PER_FRAME:
            raise Reject(
                Reason.AUDIO_LENGTH,
                f"{uri}: {len(face)} frames of picture, {len(wav) / SAMPLES_PER_FRAME:g} of sound; re-encode the clip",
            )
        flux = spectral_flux(wav.astype(np.float32) / 32768, len(face))
        offset, confidence = find_offset(mouth_motion(face), flux)
        most = self.config.max_offset_ms
        if offset is not None and most is not None and abs(offset) > most and confidence >= self.config.min_confidence:
            raise Reject(
                Reason.OUT_OF_SYNC,
                f"{uri}: the sound is {abs(offset):.0f} ms {'late' if offset > 0 else 'early'} (confidence "
                f"{confidence:.2f}), beyond sync.max_offset_ms = {most:g}; shift it, or raise the limit",
            )
        return {"sync": sync_record(offset, confidence)}


def find_offset(motion: np.ndarray, flux: np.ndarray) -> tuple[float | None, float]:
    """Milliseconds by which the sound is late, and the confidence in that.

    The offset is the place of the highest correlation of the two curves at lags within `MAX_LAG` frames, refined by a
    parabola through it and its neighbours. The confidence is that correlation, 0 to 1: at its lag, the share of the
    curves' deviation that they have in common. A highest value at the end of the lags is no peak: (None, 0).

    Args:
        motion, flux: `mouth_motion` and `spectral_flux` of the clip, [F].
    """
    from pipeline.speaker import correlations

    found = correlations(motion, flux, MAX_LAG)
    top = int(found.argmax())
    if not 0 < top < len(found) - 1 or found[top] <= 0:
        return None, 0.0
    before, peak, after = found[top - 1 : top + 2]
    bend = before - 2 * peak + after
    shift = 0.5 * (before - after) / bend if bend < 0 else 0.0
    return (top - MAX_LAG + shift) * 1000 / VIDEO_RATE, float(peak)


def sync_record(offset: float | None, confidence: float) -> dict[str, Any]:
    """The field `sync`."""
    return {"offset_ms": None if offset is None else round(float(offset), 1), "confidence": round(confidence, 3)}

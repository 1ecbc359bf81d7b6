"""What is measured of a clip from its small fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from shards.schema import VIDEO_RATE

SMALL = ("boxes", "points5", "landmarks", "track", "sync", "pitch", "energy", "units")
"""Fields that the figures are made of; together some tens of kilobytes a clip."""


@dataclass(frozen=True)
class Figure:
    """A number per clip.

    Attributes:
        label, unit: of its axis; `about` says how it is made.
        worst: which end is bad; None where neither is.
        why: what a clip at that end is called.
    """

    label: str
    unit: str
    about: str
    worst: Literal["low", "high"] | None = None
    why: str = ""


FIGURES: dict[str, Figure] = {
    "seconds": Figure("Duration", "s", "Length of the clip."),
    "hertz": Figure("Median pitch", "Hz", "Of a clip's voiced frames."),
    "voiced": Figure("Voiced share", "%", "Share of a clip's frames that have a pitch.", "low", "least voiced"),
    "energy": Figure("Mean energy", "ln amplitude", "Of a clip's frames.", "low", "quietest"),
    "face": Figure(
        "Face size", "px", "Mean of width and height of the face's box in the source.", "low", "smallest face"
    ),
    "offset": Figure(
        "Sound behind the picture",
        "ms",
        "Offset that the stage sync found; negative where the sound is early. Clips without a peak have none.",
        "high",
        "sound furthest from the picture",
    ),
    "confidence": Figure(
        "Confidence of the offset",
        "",
        "How well mouth and sound agree at that offset, 0 to 1; 0 where no peak was found.",
        "low",
        "mouth and sound agree least",
    ),
    "landmarks": Figure(
        "Landmarks against detector",
        "% of eye distance",
        "Mean distance of eye centres, nose tip and mouth corners by the landmarks to those by the face detector. It "
        "stands for confidence: where two networks agree, both are likely right.",
        "high",
        "landmarks and detector agree least",
    ),
    "lead": Figure(
        "Lead of the speaker",
        "",
        "By how much the speaker's mouth follows the sound better than that of any other face, in clips with several.",
        "low",
        "speaker least sure among several faces",
    ),
}
OF_FRAMES: dict[str, Figure] = {
    "pitch": Figure("Pitch", "Hz", "Voiced frames."),
    "frame_energy": Figure("Energy", "ln amplitude", "All frames."),
}


@dataclass(frozen=True)
class Measured:
    """A clip's figures, and what is counted over all frames: voiced pitch in Hz, energy, and how often each unit."""

    key: str
    figures: dict[str, float]
    frames: dict[str, np.ndarray]
    units: np.ndarray


def measure(key: str, frames: int, values: Mapping[str, Any]) -> Measured:
    """Figures of a clip of `frames` video frames from those of its fields that are there."""
    found: dict[str, float | None] = {"seconds": frames / VIDEO_RATE}
    series: dict[str, np.ndarray] = {}
    if "pitch" in values:
        voiced = values["pitch"][np.isfinite(values["pitch"])]
        series["pitch"] = voiced
        found["voiced"] = 100 * len(voiced) / max(1, len(values["pitch"]))
        found["hertz"] = float(np.median(voiced)) if len(voiced) else None
    if "energy" in values:
        series["frame_energy"] = values["energy"]
        found["energy"] = float(np.mean(values["energy"], dtype=np.float64))
    if "boxes" in values:
        corners = values["boxes"].astype(np.float64)
        found["face"] = float((corners[:, 2:] - corners[:, :2]).mean())
    if "sync" in values:
        found["offset"] = values["sync"].get("offset_ms")
        found["confidence"] = values["sync"].get("confidence")
    if "track" in values:
        found["lead"] = values["track"].get("margin")
    if "landmarks" in values and "points5" in values:
        found["landmarks"] = disagreement(values["landmarks"], values["points5"])
    units = np.bincount(values["units"].clip(0)) if "units" in values else np.zeros(0, int)
    figures = {name: float(value) for name, value in found.items() if value is not None and np.isfinite(value)}
    return Measured(key, figures, {name: one[np.isfinite(one)] for name, one in series.items()}, units)


def disagreement(landmarks: np.ndarray, points5: np.ndarray) -> float | None:
    """Mean distance of the landmarks' own eye centres, nose tip and mouth corners to the detector's, in percent of the
    distance of its eyes; None where these fall together.

    Args:
        landmarks: [F, 68, 2]; points5: [F, 5, 2], both in pixels.
    """
    eyes = [landmarks[:, 36:42].mean(axis=1), landmarks[:, 42:48].mean(axis=1)]
    own = np.stack([*eyes, landmarks[:, 30], landmarks[:, 48], landmarks[:, 54]], axis=1)
    apart = np.linalg.norm(points5[:, 0] - points5[:, 1], axis=1).mean()
    if not apart:
        return None
    return float(100 * np.linalg.norm(own - points5, axis=2).mean() / apart)

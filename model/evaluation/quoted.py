"""Numbers of the paper "From Faces to Voices" (Kim et al., CVPR 2025), to be printed beside measured ones.

Measured by its authors on LRS3-TED and LRS2-BBC: other clips, and another Whisper (medium), than a run here may have.
Figures have the keys and units of `figures.FIGURES`; one that is not there is not quoted. Words wrong are shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Quoted:
    """A row of a table of the paper."""

    name: str
    values: dict[str, float]


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper: what it is called, the figures that it has, and its rows."""

    name: str
    figures: tuple[str, ...]
    rows: tuple[Quoted, ...]


def _rows(figures: Sequence[str], lines: dict[str, Sequence[float]]) -> tuple[Quoted, ...]:
    return tuple(Quoted(name, dict(zip(figures, values, strict=True))) for name, values in lines.items())


_FOUR = ("utmos", "dnsmos_ovrl", "rmse_f0", "wer")
_FIVE = ("utmos", "rmse_f0", "mae_energy", "wer", "secs")

TABLE_2 = PaperTable(
    "Table 2",
    _FOUR,
    (
        Quoted("ground truth, LRS3", {"utmos": 3.545, "dnsmos_ovrl": 2.582, "wer": 0.0229}),
        Quoted("SVTS, LRS3", {}),
        Quoted("Intelligible, LRS3", {"wer": 0.2960}),
        Quoted("LTBS, LRS3", {}),
        Quoted("DiffV2S, LRS3", {}),
        *_rows(_FOUR, {"Ours, LRS3": (4.031, 2.789, 39.013, 0.3045)}),
        Quoted("ground truth, LRS2", {"utmos": 3.013, "wer": 0.0893}),
        *_rows(_FOUR, {"Ours, LRS2": (3.921, 2.586, 43.441, 0.3937)}),
    ),
)
"""Comparison of systems. Numbers of the paper that are missing are not at hand here."""

ABLATIONS = {
    "full": (4.031, 39.013, 0.650, 0.3045, 0.650),
    "hier": (3.737, 40.260, 0.763, 0.3364, 0.636),
    "timbre": (3.858, 39.563, 0.635, 0.3115, 0.632),
    "prosody": (3.866, 39.590, 0.677, 0.3503, 0.653),
    "face_id": (4.001, 40.751, 0.667, 0.3138, 0.640),
    "fe": (3.965, 40.115, 0.662, 0.3108, 0.651),
    "ws": (4.038, 40.286, 0.674, 0.3090, 0.649),
    "mp": (3.986, 39.145, 0.650, 0.3089, 0.654),
}
"""Switch of `ModelConfig` that is off -> its row of Table 4."""
LABELS = {
    "full": "full",
    "hier": "w/o Hier",
    "timbre": "w/o Timbre",
    "prosody": "w/o Prosody",
    "face_id": "w/o Face ID",
    "fe": "w/o FE",
    "ws": "w/o WS",
    "mp": "w/o MP",
}
"""How that table calls them."""
TABLE_4 = PaperTable(
    "Table 4", _FIVE, _rows(_FIVE, {f"{LABELS[switch]}, LRS3": row for switch, row in ABLATIONS.items()})
)
TABLE_5 = PaperTable(
    "Table 5",
    _FIVE,
    _rows(
        _FIVE,
        {
            "guidance 0, LRS3 valid": (3.799, 34.797, 0.793, 0.2571, 0.798),
            "guidance 0.5, LRS3 valid": (3.944, 35.171, 0.734, 0.2547, 0.800),
            "guidance 0.7, LRS3 valid": (3.946, 35.290, 0.726, 0.2527, 0.798),
            "guidance 1, LRS3 valid": (3.941, 34.982, 0.719, 0.2538, 0.794),
            "guidance 2, LRS3 valid": (3.831, 35.881, 0.707, 0.2578, 0.781),
            "guidance 4, LRS3 valid": (3.297, 37.300, 0.674, 0.2803, 0.745),
        },
    ),
)

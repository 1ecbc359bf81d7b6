"""The figures of an evaluation: what each is called, its unit, and which way is better."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Sums = dict[str, tuple[float, float]]
"""Figures of one clip: key -> (sum, count). A figure that a clip cannot have is absent."""


@dataclass(frozen=True)
class Figure:
    """One number of a table.

    Attributes:
        key: name in CSV and JSON.
        label: name in tables, for people.
        unit: of the value; empty for a pure number.
        better: which way is better; None where neither is.
        root: the value is the square root of sum / count (a root mean square).
        about: what it is, in a line.
    """

    key: str
    label: str
    unit: str
    better: Literal["higher", "lower"] | None
    root: bool
    about: str

    def value(self, total: float, count: float) -> float:
        """The figure for a sum over clips, or over one clip. `count` must be above zero."""
        mean = total / count
        return float(mean**0.5 if self.root else mean)


FIGURES: dict[str, Figure] = {
    figure.key: figure
    for figure in (
        Figure("dnsmos_ovrl", "DNSMOS", "", "higher", False, "DNSMOS P.835, overall quality, 1 to 5"),
        Figure("dnsmos_sig", "DNSMOS SIG", "", "higher", False, "DNSMOS P.835, quality of the speech itself"),
        Figure("dnsmos_bak", "DNSMOS BAK", "", "higher", False, "DNSMOS P.835, how little the background disturbs"),
        Figure("utmos", "UTMOS", "", "higher", False, "UTMOS22 strong learner, naturalness, 1 to 5"),
        Figure(
            "distillmos",
            "DistillMOS (stands in for UTMOS)",
            "",
            "higher",
            False,
            "another predictor of a mean opinion score, 1 to 5; not on the scale of UTMOS",
        ),
        Figure("rmse_f0", "RMSE F0", "Hz", "lower", True, "pitch error over frames voiced in both, pooled"),
        Figure("rmse_f0_clip", "RMSE F0, mean of clips", "Hz", "lower", False, "the same clip by clip, then the mean"),
        Figure("rmse_f0_zero", "RMSE F0, unvoiced = 0", "Hz", "lower", True, "all frames, 0 Hz where unvoiced, pooled"),
        Figure("voicing_error", "voicing error", "", "lower", False, "share of frames voiced in one of the two alone"),
        Figure("mae_energy", "MAE E", "ln", "lower", False, "mean |ln e - ln e'|, e the norm of the mel frame"),
        Figure("mae_energy_linear", "MAE E, linear", "", "lower", False, "mean |e - e'|, e the norm of the mel frame"),
        Figure("mae_mel", "MAE mel", "ln", "lower", False, "mean |mel - mel'| of the log-mels, over bins and frames"),
        Figure("wer", "WER", "", "lower", False, "word errors by Whisper, all edits over all words"),
        Figure("cer", "CER", "", "lower", False, "character errors by Whisper, all edits over all characters"),
        Figure("secs", "SECS", "", "higher", False, "cosine of GE2E speaker embeddings"),
        Figure(
            "length_error", "length error", "samples", "lower", False, "|generated - reference| in samples at 16 kHz"
        ),
    )
}

"""Metrics without networks, for tests of what is around them; importable by scoring processes."""

from __future__ import annotations

import os
import signal
from typing import Any

import numpy as np

from model.evaluation.config import EvaluationConfig
from model.evaluation.metrics import Scores
from model.evaluation.sound import Sound
from shards.errors import UserError

DEADLY, BROKEN = 0.9, 0.8
"""Peaks of sounds over which the process dies, and over which scoring fails."""


class FakeMetrics:
    """DNSMOS is the peak, and every clip has one wrong word of four."""

    def __init__(self, config: EvaluationConfig) -> None:
        self.config = config

    def describe(self) -> dict[str, Any]:
        return {"fake": 1, "beam": self.config.beam}

    def score(self, generated: Sound, reference: Sound, text: str | None) -> Scores:
        if self.config.whisper == "missing":
            raise UserError("no such Whisper: missing")
        peak = float(np.abs(generated.samples).max())
        if peak > DEADLY:
            os.kill(os.getpid(), signal.SIGKILL)
        if peak > BROKEN:
            raise ValueError("a peak")
        sums = {"dnsmos_ovrl": (peak, 1.0), "wer": (1.0, 4.0)}
        heard = None if text else "heard words"
        return Scores(sums, "what, was | heard", heard, ("a note",) if peak < 0.1 else ())

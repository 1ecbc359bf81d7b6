"""All figures of one pair of sounds."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from model.evaluation import dnsmos, words
from model.evaluation.config import EvaluationConfig
from model.evaluation.figures import Sums
from model.evaluation.packages import weights
from model.evaluation.sound import Sound
from pipeline.stages.energy import Energy
from pipeline.stages.mel import Mel
from pipeline.stages.pitch import Pitch
from shards.errors import UserError
from shards.schema import SAMPLE_RATE, SAMPLES_PER_FRAME
from shards.storage import file_sha256

if TYPE_CHECKING:
    import torch

    from model.evaluation.mos import DistillMos
    from model.evaluation.speaker import Speaker
    from model.evaluation.utmos import UtmosScore

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (
    *(f"model/evaluation/{name}.py" for name in ("dnsmos", "metrics", "mos", "prosody")),
    *(f"model/evaluation/{name}.py" for name in ("sound", "speaker", "utmos", "words")),
    *(f"pipeline/{name}.py" for name in ("container", "media", "pyin", "pyin_loops", "sound", "timeline")),
    *(f"pipeline/stages/{name}.py" for name in ("energy", "mel", "pitch")),
    "shards/mel.py",
)
"""Code below `ROOT` that decides what figures two files have; its digest is part of a cache's key."""
ON_GPU = ("mos", "speaker", "words")
"""Families whose networks run on a GPU where there is one."""
TOLERATED = 2
"""Video frames that two sounds may differ in length by without a word."""
SILENT = 1e-3
"""Peak (-60 dBFS) below which a sound counts as silent in the notes."""
OVER = 1.01
"""Peak above which clipping is worth a note: resampling alone passes full scale by less."""


@dataclass(frozen=True)
class Scores:
    """What was measured of one clip.

    Attributes:
        sums: figures, those that the clip can have.
        heard, heard_reference: Whisper's transcripts; None where it was not asked. The reference is transcribed only
            where no text is given.
        notes: why figures are absent, and what else a reader must know.
    """

    sums: Sums
    heard: str | None
    heard_reference: str | None
    notes: tuple[str, ...]


class Metrics:
    """Scores sounds; each network is loaded when it is first needed, and once.

    Raises:
        UserError: a package or file that the configuration asks for is missing; all that are missing are named.
    """

    def __init__(self, config: EvaluationConfig) -> None:
        self.config = config
        self._facts()

    def score(self, generated: Sound, reference: Sound | None, text: str | None) -> Scores:
        """Figures of a generated sound.

        Both sounds are cut to the shorter; where they differ by more than two video frames a note says so. Nothing is
        aligned or stretched. Silence is scored like any output.

        Args:
            reference: of the same clip; None leaves out what compares two sounds.
            text: what is said; None takes Whisper's transcript of the reference.
        """
        wanted = self.config.metrics
        notes = [*_remarks(generated, "generated"), *(_remarks(reference, "reference") if reference else ())]
        ours, theirs = generated.samples, None
        sums: Sums = {}
        if reference is not None:
            difference = len(ours) - len(reference.samples)
            if abs(difference) > TOLERATED * SAMPLES_PER_FRAME:
                way = "longer" if difference > 0 else "shorter"
                apart = abs(difference) / SAMPLE_RATE
                notes.append(f"generated is {apart:.2f} s {way} than the reference: the common part is scored")
            if "length" in wanted:
                sums["length_error"] = (float(abs(difference)), 1.0)
            common = min(len(ours), len(reference.samples))
            ours, theirs = ours[:common], reference.samples[:common]
        if "dnsmos" in wanted:
            sums |= {key: (value, 1.0) for key, value in self._dnsmos(ours).items()}
        if "mos" in wanted:
            with self._threads():
                sums[self._mos.key] = (self._mos(ours), 1.0)
        if theirs is not None:
            sums |= self._compare(ours, theirs, notes)
        heard = heard_reference = None
        if "words" in wanted:
            heard = self._recogniser(ours)
            if text is None and theirs is not None:
                text = heard_reference = self._recogniser(theirs)
            errors = words.word_errors(heard, text) if text is not None else {}
            if not errors:
                notes.append("no wer: no text" if text is None else f"no wer: no word in the text {text!r}")
            sums |= errors
        return Scores(sums, heard, heard_reference, tuple(notes))

    def _compare(self, ours: NDArray[np.float32], theirs: NDArray[np.float32], notes: list[str]) -> Sums:
        """Pitch, energy and speaker of two sounds of one length."""
        from model.evaluation.prosody import energy_errors, pitch_errors

        config = self.config
        sums: Sums = {}
        long_enough = len(ours) >= SAMPLES_PER_FRAME
        if not long_enough and {"pitch", "energy"} & set(config.metrics):
            notes.append(f"no pitch and energy: {len(ours)} common samples are less than a video frame")
        if "pitch" in config.metrics and long_enough:
            sums |= pitch_errors(ours, theirs, config.fmin, config.fmax)
            if "rmse_f0" not in sums:
                notes.append("no rmse_f0: no frame is voiced in both")
        if "energy" in config.metrics and long_enough:
            sums |= energy_errors(ours, theirs, config.filterbank)
        if "speaker" in config.metrics:
            with self._threads():
                voice, expected = self._speaker.embed(ours), self._speaker.embed(theirs)
            if voice is None or expected is None:
                mute = [name for name, one in (("generated", voice), ("reference", expected)) if one is None]
                notes.append(f"no secs: too little voice in {' and '.join(mute)}")
            else:
                sums["secs"] = (float(voice @ expected), 1.0)
        return sums

    def describe(self) -> dict[str, Any]:
        """What the figures depend on besides the sounds: settings, networks, versions. For records and cache keys."""
        settings = self.config.model_dump(mode="json", exclude={"utmos", "whisper", "threads", "device"})
        stages = {stage.name: stage.version for stage in (Energy, Mel, Pitch)}
        return {"code_sha256": _code(ROOT), "stages": stages, "settings": settings, "networks": self._facts()}

    def _facts(self) -> dict[str, Any]:
        sources: dict[str, Callable[[], dict[str, Any]]] = {
            "dnsmos": lambda: {"onnxruntime": importlib.metadata.version("onnxruntime"), **dnsmos.FILE.facts()},
            "mos": self._mos_facts,
            "words": lambda: words.whisper_facts(self.config.whisper),
            "normaliser": words.NORMALISER.facts,
            "speaker": self._speaker_facts,
        }
        if "words" not in self.config.metrics:
            del sources["normaliser"]
        facts, missing = {}, []
        for name, source in sources.items():
            if name in (*self.config.metrics, "normaliser"):
                try:
                    facts[name] = source()
                except UserError as error:
                    missing.append(str(error))
                except importlib.metadata.PackageNotFoundError as error:
                    missing.append(f"{name}: package {error.name} is missing; pip install 'faces2voices[evaluate]'")
        if missing:
            raise UserError("\n".join(missing))
        return facts

    def _mos_facts(self) -> dict[str, Any]:
        if self.config.utmos is not None:
            return {"predictor": "UTMOS", **weights(self.config.utmos)}
        from model.evaluation.mos import FILE

        return {"predictor": "DistillMOS (stands in for UTMOS)", **FILE.facts()}

    @staticmethod
    def _speaker_facts() -> dict[str, Any]:
        from model.evaluation.speaker import FILE

        return {"network": "GE2E", "webrtcvad-wheels": importlib.metadata.version("webrtcvad-wheels"), **FILE.facts()}

    @cached_property
    def _device(self) -> torch.device:
        import torch

        from pipeline.networks.device import compute_type

        compute_type("float32")
        return torch.device(device_of(self.config))

    @contextmanager
    def _threads(self) -> Iterator[None]:
        """Torch's threads as configured, for a while: the process may have other networks."""
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(self.config.threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    @cached_property
    def _dnsmos(self) -> dnsmos.Dnsmos:
        return dnsmos.Dnsmos(self.config.threads)

    @cached_property
    def _mos(self) -> DistillMos | UtmosScore:
        if self.config.utmos is not None:
            from model.evaluation.utmos import UtmosScore

            return UtmosScore(self.config.utmos, self._device)
        from model.evaluation.mos import DistillMos

        return DistillMos(self._device)

    @cached_property
    def _speaker(self) -> Speaker:
        from model.evaluation.speaker import Speaker

        return Speaker(self._device)

    @cached_property
    def _recogniser(self) -> words.Recogniser:
        config = self.config
        return words.Recogniser(config.whisper, config.whisper_prompt, config.beam, config.threads, config.device)


def device_of(config: EvaluationConfig) -> str:
    """Where networks of these settings run: `cpu`, `cuda` or `cuda:N`; `cpu` where no metric has one that a GPU takes.

    Raises:
        UserError: no such GPU.
    """
    name = config.device
    if name == "cpu" or not {*ON_GPU} & {*config.metrics}:
        return "cpu"
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return "cuda" if count else "cpu"
    if int(name.partition(":")[2] or 0) >= count:
        raise UserError(f"device {name}: this torch sees {count} GPUs; use device cpu")
    return name


@cache
def _code(root: Path) -> str:
    """Digest of `SOURCES`."""
    return sha256(json.dumps({name: file_sha256(root / name) for name in SOURCES}).encode()).hexdigest()


def _remarks(sound: Sound, name: str) -> list[str]:
    """What is odd about one sound alone."""
    remarks = []
    if float(np.abs(sound.samples).max(initial=0)) < SILENT:
        remarks.append(f"{name} is silent")
    if sound.peak > OVER:
        remarks.append(f"{name} passes full scale (peak {sound.peak:.2f}) and is clipped")
    if sound.video_frames is not None:
        apart = sound.seconds * SAMPLE_RATE / SAMPLES_PER_FRAME - sound.video_frames
        if abs(apart) > TOLERATED:
            way = "longer" if apart > 0 else "shorter"
            remarks.append(f"{name}: its sound is {abs(apart):.1f} video frames {way} than its picture")
    return remarks

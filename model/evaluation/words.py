"""Word and character errors by Whisper (Radford et al. 2022), both texts through its English normaliser."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.evaluation.figures import Sums
from model.evaluation.packages import PackageFile, weights
from pipeline.networks.ctranslate2 import find_weights
from shards.errors import UserError, warn
from shards.schema import SAMPLE_RATE
from shards.storage import file_sha256

NORMALISER = PackageFile(
    "Whisper's normaliser", "whisper-normalizer", "whisper_normalizer", "0.1.15", "normalizers/english.json"
)
WINDOW = 30 * SAMPLE_RATE
"""Samples that Whisper reads at a time; only longer sound needs its time stamps."""


class Recogniser:
    """Whisper in faster-whisper: English, float32, temperature 0 without fall-back, no voice detector before it.

    Args:
        name, prompt, beam, device: `whisper`, `whisper_prompt`, `beam` and `device` of the configuration.

    Raises:
        UserError: faster-whisper is missing, or there is no such model here and none can be fetched.
    """

    def __init__(
        self,
        name: str = "bundled",
        prompt: str | None = None,
        beam: int = 5,
        threads: int = 1,
        device: str = "auto",
    ) -> None:
        self._prompt, self._beam = prompt, beam
        place = str(whisper_folder(name) or name)
        self._whisper = _on_device(place, threads, device)

    def __call__(self, wave: NDArray[np.float32]) -> str:
        """What is heard in a mono 16 kHz signal [N] in -1..1; empty where nothing is."""
        return _transcribe(self._whisper, wave, self._prompt, self._beam)


def _transcribe(whisper: Any, wave: NDArray[np.float32], prompt: str | None, beam: int) -> str:
    segments, _ = whisper.transcribe(
        wave,
        language="en",
        beam_size=beam,
        temperature=0.0,
        initial_prompt=prompt,
        without_timestamps=len(wave) <= WINDOW,
        vad_filter=False,
    )
    return " ".join(segment.text.strip() for segment in segments)


def _on_device(place: str, threads: int, device: str) -> Any:
    try:
        import ctranslate2
        from faster_whisper import WhisperModel
    except ModuleNotFoundError as error:
        raise UserError(f"Whisper: package {error.name} is missing; pip install 'faces2voices[evaluate]'") from None

    kind, _, index = device.partition(":")

    def load(where: str) -> Any:
        whisper = WhisperModel(
            place, device=where, device_index=int(index or 0), compute_type="float32", cpu_threads=threads
        )
        if where == "cuda":  # libraries of the GPU are only looked for when it works
            _transcribe(whisper, np.zeros(SAMPLE_RATE, np.float32), None, 1)
        return whisper

    try:
        if kind == "cuda" or (kind == "auto" and ctranslate2.get_cuda_device_count()):
            try:
                return load("cuda")
            except RuntimeError as error:
                if kind == "cuda":
                    raise
                warn(f"Whisper runs on the processor: the GPU cannot be used ({' '.join(str(error).split())})")
        return load("cpu")
    except Exception as error:  # the hub's client fails in many ways
        said = " ".join(str(error).split())
        advice = "name a folder in CTranslate2's format, a model that can be fetched, or `bundled`"
        raise UserError(f"Whisper {place!r}: cannot be loaded ({said[:200]}); {advice}") from None


def whisper_folder(name: str) -> Path | None:
    """Folder of a Whisper in CTranslate2's format; None where `name` is one that faster-whisper knows.

    Raises:
        UserError: a path without such a model, or the package of the bundled one is missing.
    """
    if name == "bundled":
        return find_weights().parent
    folder = Path(name).expanduser()
    if (folder / "model.bin").is_file():
        return folder
    if folder.exists() or folder.is_absolute() or name.startswith("."):
        raise UserError(f"Whisper {name!r}: no folder in CTranslate2's format (no {folder / 'model.bin'})")
    return None


def whisper_facts(name: str) -> dict[str, Any]:
    """Name and weights of a Whisper, for records. See `whisper_folder`."""
    import importlib.metadata

    folder = whisper_folder(name)
    label = "tiny.en (bundled)" if name == "bundled" else folder.name if folder else name
    versions = {package: importlib.metadata.version(package) for package in ("faster-whisper", "ctranslate2")}
    if folder is None:
        return {"model": label, **versions}
    # Tokens that Whisper may not say stand in its settings.
    beside = {path.name: file_sha256(path) for path in sorted(folder.glob("*.json"))}
    return {"model": label, **versions, **weights(folder / "model.bin"), "beside": beside}


@cache
def _normaliser() -> Any:
    NORMALISER.path()
    from whisper_normalizer.english import EnglishTextNormalizer

    return EnglishTextNormalizer()


def normalise(text: str) -> str:
    """Text as it is compared: lower case, no punctuation, no fillers (hm, um) nor bracketed notes, contractions
    written out, American spelling, numbers in digits.

    Raises:
        UserError: the package is missing.
    """
    return " ".join(_normaliser()(text).split())


def word_errors(heard: str, text: str) -> Sums:
    """`wer` and `cer` of a transcript against what was said; empty where the text has no letter and no digit.

    Characters are those of the normalised texts, single spaces between words among them.
    """
    said, got = normalise(text), normalise(heard)
    words = said.split()
    if not any(map(str.isalnum, said)):  # of an ellipsis the normaliser leaves a dot
        return {}
    return {
        "wer": (float(edits(words, got.split())), float(len(words))),
        "cer": (float(edits(said, got)), float(len(said))),
    }


def edits(said: Sequence[str], heard: Sequence[str]) -> int:
    """Least number of insertions, deletions and substitutions of items that turn one sequence into the other."""
    names = {item: number for number, item in enumerate({*said, *heard})}
    other = np.array([names[item] for item in heard], np.int64)
    places = np.arange(len(heard) + 1)
    row = places
    for item in said:
        best = row + 1
        best[1:] = np.minimum(best[1:], row[:-1] + (other != names[item]))
        row = np.minimum.accumulate(best - places) + places  # insertions, from left to right
    return int(row[-1])

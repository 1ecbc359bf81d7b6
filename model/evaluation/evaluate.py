"""Scores of generated speech beside its reference, clip by clip."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from model.evaluation.bootstrap import Interval, summarise
from model.evaluation.cache import ScoreCache
from model.evaluation.config import EvaluationConfig
from model.evaluation.figures import FIGURES, Sums
from model.evaluation.partners import Pair, find_pairs
from model.evaluation.scoring import Failed, Make, score_pairs
from shards.progress import Progress

PACKAGES = ("faces2voices", "numpy", "torch", "onnxruntime", "librosa", "faster-whisper", "ctranslate2")
"""Whose versions a record names; figures may depend on them."""


@dataclass(frozen=True)
class ClipScores:
    """What was measured of one clip.

    Attributes:
        key: path below both roots without suffix.
        sums: figure -> (sum, count); figures that this clip does not have are absent.
        heard: transcript of the generated speech; None where words were not asked for.
        text: what words were compared with.
        text_from: `file` beside the reference, `table`, `shards`, or `heard` by Whisper in the reference; empty
            without words.
        notes: what a reader of the figures should know, such as lengths that differ.
        generated, reference: the files.
    """

    key: str
    sums: Sums
    heard: str | None
    text: str | None
    text_from: str
    notes: tuple[str, ...]
    generated: str
    reference: str


@dataclass
class Evaluation:
    """A system's clips, and what could not be scored.

    Attributes:
        name: of the system, as tables show it.
        missing: clips that only one side has, a line each: the key, and where there is no file for it.
        unreadable: clips that could not be scored, a line each: the key, and why.
        facts: how it was made and measured, as plain JSON values.
    """

    name: str
    clips: list[ClipScores]
    missing: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def sums(self) -> dict[str, Sums]:
        """Key -> sums of every clip, as `bootstrap.paired` takes them."""
        return {clip.key: clip.sums for clip in self.clips}

    def summary(self) -> dict[str, Interval]:
        """Every figure of the corpus with its interval, in the order of `FIGURES`, then others."""
        found = summarise([clip.sums for clip in self.clips])
        return {key: found[key] for key in [*FIGURES, *(key for key in found if key not in FIGURES)] if key in found}


def evaluate_folders(
    generated: Path,
    reference: Path,
    config: EvaluationConfig,
    name: str = "",
    workers: int | None = None,
    cache: Path | None = None,
    texts: Path | None = None,
    clips: int | None = None,
    make: Make | None = None,
) -> Evaluation:
    """Score every generated clip that has a reference: the same path without suffix below both folders.

    Args:
        generated, reference: two folders, or two files, of sound or video at any rate.
        name: of the system; default the name of `generated`.
        workers: processes; default as many as there are cores, or one where networks run on a GPU.
        cache: folder of scores that are known already; default one in the user's cache.
        texts: CSV with the columns `key` and `text`; without it, KEY.txt beside the reference, and where that is
            missing too, what Whisper hears in the reference.
        clips: so many, drawn by key: the same of every system.
        make: see `score`.

    Raises:
        UserError: no such folder, not a single pair, or metrics that lack a file or a package.
    """
    pairs, missing = find_pairs(generated, reference, texts, clips)
    evaluation = score(pairs, config, name or generated.name or str(generated), workers, cache, make)
    evaluation.missing = missing
    evaluation.facts = {"generated": str(generated), "reference": str(reference), **evaluation.facts}
    return evaluation


def score(
    pairs: Sequence[Pair],
    config: EvaluationConfig,
    name: str,
    workers: int | None = None,
    cache: Path | None = None,
    make: Make | None = None,
) -> Evaluation:
    """Scores of pairs, in their order; those that were measured before come from the cache.

    Args:
        name, workers, cache: see `evaluate_folders`.
        make: what builds the metrics in each process; default `model.evaluation.metrics.Metrics`.

    Raises:
        UserError: metrics that lack a file or a package, or that fail for one clip after the other.
    """
    from model.evaluation.metrics import Metrics, device_of

    make = make or Metrics
    device = device_of(config)
    # Processes would each have their networks in the memory of the one GPU, and wait for each other.
    workers = workers or (cores() if device == "cpu" else 1)
    measured = make(config).describe()
    store = ScoreCache(cache, measured)

    def known(pair: Pair) -> tuple[str, Any]:
        """Name of a pair's entry, and its scores where it has them."""
        try:
            entry = store.name(pair.generated, pair.reference, pair.text)
        except OSError as error:
            return "", Failed(f"{error.filename}: cannot be read ({error.strerror})", unreadable=True)
        return entry, store.get(entry)

    with Progress(f"evaluate {name}", len(pairs), "clips") as progress:
        with ThreadPoolExecutor(cores()) as pool:
            looked = list(pool.map(known, pairs))
        found = [scores for _, scores in looked]
        todo = [index for index, scores in enumerate(found) if scores is None]
        progress.advance(len(pairs) - len(todo))
        crew = min(workers, len(todo))
        works = any(scores is not None and not isinstance(scores, Failed) for scores in found)
        for index, scores in score_pairs([pairs[index] for index in todo], config, crew, make, works):
            if not isinstance(scores, Failed):
                scores = _finite(scores)
                store.put(looked[todo[index]][0], scores)
            found[todo[index]] = scores
            progress.advance()
    clips, unreadable = [], []
    for pair, scores in zip(pairs, found, strict=True):
        if isinstance(scores, Failed):
            unreadable.append(f"{pair.key}: {scores.why}")
        else:
            clips.append(_clip(pair, scores))
    facts = {"measured": measured, "device": device, "versions": versions(), "known_before": len(pairs) - len(todo)}
    return Evaluation(name, clips, unreadable=unreadable, facts=facts)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions() -> dict[str, str]:
    """Of Python and the packages that figures depend on; those that are not installed are left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _finite(scores: Any) -> Any:
    """Scores without numbers that are not finite: a network may fail on odd sound, and one would spoil the corpus."""
    odd = [key for key, value in scores.sums.items() if not all(map(math.isfinite, value))]
    sums = {key: value for key, value in scores.sums.items() if key not in odd}
    return replace(scores, sums=sums, notes=(*scores.notes, *(f"no {key}: not a finite number" for key in odd)))


def _clip(pair: Pair, scores: Any) -> ClipScores:
    text, text_from = pair.text, str(pair.text_from)
    if scores.heard is None:
        text, text_from = None, ""
    elif text is None:
        text, text_from = scores.heard_reference, "heard"
    return ClipScores(
        pair.key,
        scores.sums,
        scores.heard,
        text,
        text_from,
        scores.notes,
        str(pair.generated),
        str(pair.reference),
    )

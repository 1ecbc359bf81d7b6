"""Scores of generated speech beside its reference, clip by clip."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model.evaluation.bootstrap import Interval, summarise
from model.evaluation.config import EvaluationConfig
from model.evaluation.figures import Sums


@dataclass(frozen=True)
class ClipScores:
    """What was measured of one clip.

    Attributes:
        key: path below both roots without suffix.
        sums: figure -> (sum, count); figures that this clip does not have are absent.
        heard: transcript of the generated speech; None where words were not asked for.
        text: what words were compared with.
        text_from: `file` beside the reference, `table`, or `heard` by Whisper in the reference; empty without words.
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
        """Every figure of the corpus with its interval."""
        return summarise([clip.sums for clip in self.clips])


def evaluate_folders(
    generated: Path,
    reference: Path,
    config: EvaluationConfig,
    name: str = "",
    workers: int | None = None,
    cache: Path | None = None,
    texts: Path | None = None,
    clips: int | None = None,
) -> Evaluation:
    """Score every generated clip that has a reference: the same path without suffix below both folders.

    Args:
        generated, reference: two folders, or two files, of sound or video at any rate.
        name: of the system; default the name of `generated`.
        workers: processes; default as many as there are cores.
        cache: folder of scores that are known already; default one in the user's cache.
        texts: CSV with the columns `key` and `text`; without it, KEY.txt beside the reference, and where that is
            missing too, what Whisper hears in the reference.
        clips: so many, drawn by key: the same of every system.

    Raises:
        UserError: no such folder, or not a single pair.
    """
    raise NotImplementedError

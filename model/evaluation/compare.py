"""Several systems on the same clips: one table, paired differences, and what a page about them shows."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from model.evaluation.bootstrap import Interval, paired, summarise
from model.evaluation.config import EvaluationConfig, Family
from model.evaluation.contestants import common_clips
from model.evaluation.evaluate import ClipScores, Evaluation, score
from model.evaluation.figures import FIGURES, Sums
from model.evaluation.partners import draw, find_pairs
from model.evaluation.scoring import Make
from model.evaluation.tables import cell, clip_value, details, differences, json_text, table
from shards.errors import UserError
from shards.storage import open_store

ALONE: tuple[Family, ...] = ("dnsmos", "mos", "words")
"""Families that judge a sound by itself, or against its text: the reference has them too."""


@dataclass(frozen=True)
class Comparison:
    """Systems scored on the clips that all of them have.

    Attributes:
        reference, last: names of the original sound, and of the system that the others are held against.
        evaluations: by system, in the order in which they were named; each has the same clips in the same order.
        lacking: clip -> systems that have no file of it.
        unreadable: a line per clip that could not be scored: system, clip and why. No system has such a clip.
    """

    reference: str
    last: str
    evaluations: dict[str, Evaluation]
    lacking: dict[str, list[str]]
    unreadable: list[str]

    @cached_property
    def keys(self) -> list[str]:
        """Clips that were scored."""
        return [clip.key for clip in self.evaluations[self.last].clips]

    def clip(self, system: str, key: str) -> ClipScores:
        """Raises KeyError."""
        return self._clips[system][key]

    @cached_property
    def _clips(self) -> dict[str, dict[str, ClipScores]]:
        return {name: {clip.key: clip for clip in one.clips} for name, one in self.evaluations.items()}

    @cached_property
    def summaries(self) -> dict[str, dict[str, Interval]]:
        """System -> figure -> value with interval."""
        return {name: evaluation.summary() for name, evaluation in self.evaluations.items()}

    @cached_property
    def differences(self) -> dict[str, dict[str, Interval]]:
        """System -> figure -> its value less that of the last system, on the clips that both have the figure of.
        Systems that share no figure with it are left out."""
        last = self.evaluations[self.last].sums()
        found = {name: paired(one.sums(), last) for name, one in self.evaluations.items() if name != self.last}
        return {name: figures for name, figures in found.items() if figures}

    @cached_property
    def best(self) -> dict[str, str]:
        """Figure -> the best system, only where it is surely so (see `surely_best`). The reference does not compete."""
        return surely_best({name: one.sums() for name, one in self.evaluations.items() if name != self.reference})

    def table(self) -> str:
        """Markdown: a row per system, bold where one is surely the best, and the paper's rows."""
        clips = dict.fromkeys(self.evaluations, len(self.keys))
        return table(self.summaries, clips, title="system", best=self.best)


def surely_best(systems: dict[str, dict[str, Sums]]) -> dict[str, str]:
    """Figure -> the system that is surely better than every other (`Interval.sure` of the paired difference).

    Figures of which neither way is better, and those that only one system has, name nobody.

    Args:
        systems: name -> clip -> sums.
    """
    found: dict[str, str] = {}
    values = {name: summarise(list(clips.values())) for name, clips in systems.items()}
    for key, figure in FIGURES.items():
        ranked = [name for name in systems if key in values[name]]
        if figure.better is None or len(ranked) < 2:
            continue
        sign = 1 if figure.better == "higher" else -1
        best = max(ranked, key=lambda name: sign * values[name][key].value)
        # The runner-up alone would not do: the difference to a third may be larger and yet less sure.
        mine = {clip: {key: sums[key]} for clip, sums in systems[best].items() if key in sums}
        apart = [paired(mine, systems[name]).get(key) for name in ranked if name != best]
        if all(one is not None and one.sure() == sign for one in apart):
            found[key] = best
    return found


def compare(
    systems: dict[str, Path],
    reference: str,
    config: EvaluationConfig,
    workers: int | None = None,
    cache: Path | None = None,
    texts: Path | None = None,
    clips: int | None = None,
    make: Make | None = None,
) -> Comparison:
    """Score every system beside the reference, on the clips that all of them have.

    The reference itself is scored where nothing is compared with it: predictors of opinion, and words where their text
    is known (its own transcript would agree with itself).

    Args:
        systems: name -> folder, the reference among them.
        clips: so many of the common clips, drawn by key; None: all.
        workers, cache, texts, make: see `evaluate.evaluate_folders`.

    Raises:
        UserError: no such reference, no system beside it, no clip that all have and that can be read, or metrics that
            lack a file or a package.
    """
    if reference not in systems:
        raise UserError(
            f"no system is called {reference!r}: name the original sound {reference}=DIR, or --reference NAME"
        )
    if len(systems) < 2:
        raise UserError(f"only {reference} is named; name a system to compare with it, e.g. ours=DIR")
    common, lacking = common_clips(systems)
    chosen = set(draw(common, clips))
    others = [name for name in systems if name != reference]
    alone = tuple(family for family in config.metrics if family in ALONE)
    evaluations: dict[str, Evaluation] = {}
    # Systems are scored in one go, so that each process loads its networks once for all of them.
    for names, families in (([reference], alone), (others, config.metrics)):
        if not families:
            continue
        owners, pairs = {}, []
        for name in names:
            for pair in find_pairs(systems[name], systems[reference], texts)[0]:
                if pair.key in chosen:
                    pairs.append(replace(pair, key=f"{name}: {pair.key}"))
                    owners[pairs[-1].key] = name, pair.key
        settings = config.model_copy(update={"metrics": families})
        scored = score(pairs, settings, ", ".join(names), workers, cache, make)
        for name in names:
            mine = [replace(one, key=owners[one.key][1]) for one in scored.clips if owners[one.key][0] == name]
            lost = [line for line in scored.unreadable if line.startswith(f"{name}: ")]
            evaluations[name] = Evaluation(name, mine, [], lost, {"folder": str(systems[name]), **scored.facts})
    if reference in evaluations:
        evaluations[reference].clips = [_without_own_words(clip) for clip in evaluations[reference].clips]
    evaluations = {name: evaluations[name] for name in systems if name in evaluations}
    unreadable = [line for one in evaluations.values() for line in one.unreadable]
    whole = set.intersection(*({clip.key for clip in one.clips} for one in evaluations.values()))
    if not whole:
        raise UserError(f"no clip could be scored in all systems: {'; '.join(unreadable[:3])}")
    for evaluation in evaluations.values():
        evaluation.clips = [clip for clip in evaluation.clips if clip.key in whole]
    return Comparison(reference, others[-1], evaluations, lacking, unreadable)


def _without_own_words(clip: ClipScores) -> ClipScores:
    if clip.text_from != "heard":
        return clip
    sums = {key: pair for key, pair in clip.sums.items() if key not in ("wer", "cer")}
    return replace(clip, sums=sums)


def left_out(comparison: Comparison) -> list[str]:
    """A line per clip that is not in the comparison."""
    lines = [f"{key}: not in {', '.join(names)}" for key, names in comparison.lacking.items()]
    return [*lines, *comparison.unreadable]


def markdown(comparison: Comparison) -> str:
    """Main table, paired differences, every figure, and what was left out."""
    title = f"{len(comparison.evaluations)} systems, {len(comparison.keys)} clips"
    parts = [f"# {title}", comparison.table()]
    if comparison.differences:
        parts += [f"## Difference to {cell(comparison.last)}", differences(comparison.differences, "system")]
    parts += ["## Every figure", details(comparison.summaries)]
    lost = left_out(comparison)
    parts += ["## Left out", "\n".join(f"* {cell(line)}" for line in lost)] if lost else []
    return "\n\n".join(part.strip() for part in parts) + "\n"


def clips_csv(comparison: Comparison) -> str:
    """Long form: a row per clip, system and figure, with the sum and count that corpus values are made of."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["key", "system", "figure", "value", "sum", "count"])
    for name, evaluation in comparison.evaluations.items():
        for clip in evaluation.clips:
            for key, (total, count) in clip.sums.items():
                value = clip_value(key, (total, count))
                cells = ["" if one is None else f"{one:.6g}" for one in (value, total, count)]
                writer.writerow([clip.key, name, key, *cells])
    return buffer.getvalue()


def record(comparison: Comparison) -> dict[str, Any]:
    """All of it as plain JSON values."""

    def plain(found: dict[str, dict[str, Interval]]) -> dict[str, Any]:
        return {name: {key: asdict(one) for key, one in figures.items()} for name, figures in found.items()}

    return {
        "reference": comparison.reference,
        "last": comparison.last,
        "clips": comparison.keys,
        "lacking": comparison.lacking,
        "unreadable": comparison.unreadable,
        "figures": plain(comparison.summaries),
        "differences_to_last": plain(comparison.differences),
        "surely_best": comparison.best,
        "heard": {
            name: {clip.key: {"heard": clip.heard, "text": clip.text, "notes": clip.notes} for clip in one.clips}
            for name, one in comparison.evaluations.items()
        },
        "facts": {name: one.facts for name, one in comparison.evaluations.items()},
    }


def write(comparison: Comparison, folder: Path) -> None:
    """`table.md`, `clips.csv` and `comparison.json`, each whole or not at all."""
    store = open_store(str(folder))
    store.write("table.md", markdown(comparison).encode(errors="backslashreplace"))
    store.write("clips.csv", clips_csv(comparison).encode(errors="backslashreplace"))
    store.write("comparison.json", json_text(record(comparison)).encode())

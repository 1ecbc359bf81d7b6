"""Evaluations as Markdown laid out like the paper's tables, CSV of clips, and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from model.evaluation.bootstrap import FEWEST, Interval
from model.evaluation.evaluate import Evaluation
from model.evaluation.figures import FIGURES
from model.evaluation.quoted import TABLE_2, PaperTable
from shards.storage import open_store

PERCENT = ("wer", "cer", "voicing_error")
"""Shares that tables show as percent, as the paper does."""
MAIN = ("utmos", "distillmos", "dnsmos_ovrl", "rmse_f0", "mae_energy", "wer", "secs")
"""Columns of a table, where anybody has them: those of the paper's Tables 2, 4 and 5, and what stands in for UTMOS."""
ARROWS = {"higher": " ↑", "lower": " ↓", None: ""}
NONE = "–"
SURE = f"the 95 % interval does not hold 0, on {FEWEST} clips or more."

Summaries = Mapping[str, Mapping[str, Interval]]
"""System -> figure -> value and interval."""


def table(
    systems: Summaries,
    clips: Mapping[str, int],
    paper: PaperTable = TABLE_2,
    title: str = "method",
    best: Mapping[str, str] | None = None,
) -> str:
    """Markdown: a row per system with 95 % intervals, then the paper's rows, each marked as quoted.

    A figure that not all clips of a row have says on how many it stands.

    Args:
        clips: system -> its clips.
        best: figure -> the system that is bold in it. Where this is given, columns and rows of the paper's that no
            system here has a figure of are left out.
    """
    keys = columns(systems, () if best is not None else paper.figures)
    lines = [_line([title, *(heading(key) for key in keys)]), "|---" * (len(keys) + 1) + "|"]
    for name, found in systems.items():
        cells = [shown(key, found.get(key)) + fewer(found.get(key), clips[name]) for key in keys]
        marks = ["**" if best and best.get(key) == name else "" for key in keys]
        lines.append(_line([cell(name), *(f"{mark}{text}{mark}" for mark, text in zip(marks, cells, strict=True))]))
    quoted = quoted_rows(keys, paper, every=best is None)
    lines += [_line([f"*{name} (quoted)*", *cells]) for name, cells in quoted.items()]
    lines += ["", *[f"Rows marked *(quoted)*: {SOURCE.format(paper.name)}"] * bool(quoted)]
    lines += [f"{NONE}: not measured, or not quoted here. {INTERVALS}" + (f" Bold: {BEST}" if best is not None else "")]
    return "\n".join(lines) + "\n"


INTERVALS = (
    "In brackets: 95 % interval, bootstrap over clips; a number of clips: those that have the figure, if not all do."
)
BEST = f"best of the systems; of its paired difference to each other one {SURE}"
SOURCE = (
    "{} of the paper (Kim et al., CVPR 2025): measured by its authors on their clips with their networks, not here."
)


def columns(systems: Summaries, more: Collection[str] = ()) -> list[str]:
    """Figures of the main table: those of the paper's, where any system, or `more`, has them; else all."""
    there = {key for found in systems.values() for key in found} | {*more}
    return [key for key in MAIN if key in there] or [key for key in FIGURES if key in there]


def quoted_rows(keys: Sequence[str], paper: PaperTable = TABLE_2, every: bool = False) -> dict[str, list[str]]:
    """The paper's rows that have any of these figures, or every one: name -> cells."""
    return {
        row.name: [number(key, row.values[key]) if key in row.values else NONE for key in keys]
        for row in paper.rows
        if every or any(key in row.values for key in keys)
    }


def fewer(found: Interval | None, clips: int) -> str:
    """` (n clips)` where a figure stands on fewer than there are; else nothing."""
    return f" ({found.clips} clips)" if found is not None and found.clips < clips else ""


def details(systems: Summaries) -> str:
    """Markdown: every figure that any system has, a line each."""
    keys = list(dict.fromkeys([*FIGURES, *(key for found in systems.values() for key in found)]))
    lines = [_line(["figure", *map(cell, systems), "what it is"]), "|---" * (len(systems) + 2) + "|"]
    for key in keys:
        if any(key in found for found in systems.values()):
            values = [shown(key, found.get(key), clips=True) for found in systems.values()]
            about = FIGURES[key].about if key in FIGURES else PREDICTED.get(key, "")
            lines.append(_line([heading(key), *values, cell(about)]))
    return "\n".join(lines) + "\n"


PREDICTED = {
    "unit_accuracy": "share of frames whose unit is predicted right (this and the following: before the vocoder)",
    "timbre_mae": "mean |t - t'| of the predicted timbre",
    "pitch_mae": "mean |p - p'| of the predicted pitch, standardised over the clip",
    "energy_mae": "mean |ln e - ln e'| of the predicted energy",
    "mel_l1": "mean |m - m'| of the log-mel",
}
"""What a system predicts beside sound, scored against the shards."""


def differences(pairs: Summaries, title: str) -> str:
    """Markdown: paired differences, a row per system; those that are `sure` are bold."""
    keys = [key for key in MAIN if any(key in found for found in pairs.values())]
    lines = [_line([title, *(heading(key) for key in keys)]), "|---" * (len(keys) + 1) + "|"]
    for name, found in pairs.items():
        cells = []
        for key in keys:
            text = shown(key, found.get(key), sign=True)
            cells.append(f"**{text}**" if key in found and found[key].sure() else text)
        lines.append(_line([cell(name), *cells]))
    lines += ["", f"On the same clips, drawn together. Bold: {SURE}"]
    return "\n".join(lines) + "\n"


def heading(key: str) -> str:
    """Label, unit and an arrow to the better side."""
    figure = FIGURES.get(key)
    if figure is None:
        return key.replace("_", " ")
    unit = "%" if key in PERCENT else figure.unit
    return f"{figure.label}{f' ({unit})' if unit else ''}{ARROWS[figure.better]}"


def number(key: str, value: float, sign: bool = False) -> str:
    """A value as tables show it; shares as percent."""
    percent = key in PERCENT
    return f"{100 * value if percent else value:{'+' if sign else ''}.{2 if percent else 3}f}"


def shown(key: str, found: Interval | None, sign: bool = False, clips: bool = False) -> str:
    """Value and interval, or a dash."""
    if found is None:
        return NONE
    text = f"{number(key, found.value, sign)} [{number(key, found.low, sign)}, {number(key, found.high, sign)}]"
    return f"{text}, {found.clips} clips" if clips else text


def cell(text: str) -> str:
    """Text of others, as it may stand in a cell of a table."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|") or NONE


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def clips_csv(evaluation: Evaluation) -> str:
    """A row per clip: key, a column per figure (empty where the clip has none), text, what was heard, notes, files."""
    found = {key for clip in evaluation.clips for key in clip.sums}
    keys = [key for key in FIGURES if key in found] + sorted(found - FIGURES.keys())
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["key", *keys, "heard", "text", "text_from", "notes", "generated", "reference"])
    for clip in evaluation.clips:
        values = [clip_value(key, clip.sums.get(key)) for key in keys]
        cells = ["" if value is None else f"{value:.6g}" for value in values]
        words = [clip.heard or "", clip.text or "", clip.text_from, "; ".join(clip.notes)]
        writer.writerow([clip.key, *cells, *words, clip.generated, clip.reference])
    return buffer.getvalue()


def clip_value(key: str, pair: tuple[float, float] | None) -> float | None:
    """Figure of one clip; None where it has none."""
    if pair is None or pair[1] <= 0:
        return None
    value = pair[0] / pair[1]
    return value**0.5 if key in FIGURES and FIGURES[key].root else value


def summary_json(evaluation: Evaluation) -> dict[str, Any]:
    """Values with intervals, counts, what is missing, and how it was made, as plain JSON values."""
    return {
        "name": evaluation.name,
        "figures": {key: asdict(found) for key, found in evaluation.summary().items()},
        "clips": len(evaluation.clips),
        "missing": evaluation.missing,
        "unreadable": evaluation.unreadable,
        "notes": notes(evaluation),
        "facts": evaluation.facts,
    }


def notes(evaluation: Evaluation) -> dict[str, int]:
    """Where texts come from and how many clips have notes."""
    found: dict[str, int] = {}
    for clip in evaluation.clips:
        if clip.text_from:
            name = f"text from {clip.text_from}"
            found[name] = found.get(name, 0) + 1
        if clip.notes:
            found["with notes"] = found.get("with notes", 0) + 1
    return found


def markdown(evaluation: Evaluation) -> str:
    """The whole page: table, every figure, and how it was measured."""
    systems = {evaluation.name: evaluation.summary()}
    facts = json.dumps(evaluation.facts, indent=1, sort_keys=True, default=str)
    lost = [f"* {cell(line)}" for line in (*evaluation.missing, *evaluation.unreadable)]
    count = {evaluation.name: len(evaluation.clips)}
    lines = [
        f"# {cell(evaluation.name)}: {len(evaluation.clips)} clips",
        "",
        table(systems, count),
        "",
        details(systems),
    ]
    lines += ["", "Not scored:", "", *lost] if lost else []
    return "\n".join([*lines, "", "```json", facts, "```", ""])


def write(evaluation: Evaluation, folder: Path) -> None:
    """`clips.csv`, `summary.json` and `table.md`, each whole or not at all."""
    store = open_store(str(folder))
    store.write("clips.csv", clips_csv(evaluation).encode(errors="backslashreplace"))
    store.write("summary.json", json_text(summary_json(evaluation)).encode())
    store.write("table.md", markdown(evaluation).encode(errors="backslashreplace"))


def json_text(tree: Any) -> str:
    return json.dumps(tree, indent=1, default=str, allow_nan=False) + "\n"


def terminal(evaluation: Evaluation, listed: int = 20) -> Sequence[str]:
    """For a terminal: a line per figure, and what was not scored."""
    found = [f"{evaluation.name}: {len(evaluation.clips)} clips"]
    found += [f"  {heading(key):<42}{shown(key, value)}" for key, value in evaluation.summary().items()]
    found += [f"{name}: {count} clips" for name, count in notes(evaluation).items()]
    lost = [*evaluation.missing, *evaluation.unreadable]
    found += [f"not scored: {len(lost)} clips"] * bool(lost) + [f"  {line}" for line in lost[:listed]]
    return [*found, f"  and {len(lost) - listed} more"] if len(lost) > listed else found

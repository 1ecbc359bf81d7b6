"""A build's progress in words: lines for a terminal and for a log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.tally import Tally
from pipeline.words import count

NAME, BAR, NARROW = 11, 20, 76
"""Letters of a stage's name and of a bar; with fewer columns than NARROW there is no bar."""


def clock(seconds: float) -> str:
    """`0:07`, `12:30` or `3:04:05`."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


@dataclass(frozen=True)
class State:
    """A build at one moment: its stages, seconds since it began, seconds to go where they are known, machines."""

    stages: Mapping[str, Tally]
    seconds: float
    eta: float | None
    nodes: int

    def done(self) -> float:
        """Clip stages that are through."""
        return sum(tally.through() for tally in self.stages.values())

    def total(self) -> int:
        """Clip stages that are known."""
        return sum(tally.total for tally in self.stages.values())

    def left(self) -> bool:
        """Whether a task waits or is in hand."""
        return any(tally.waiting or tally.hand for tally in self.stages.values())

    def workers(self) -> int:
        """Workers that have a task."""
        return sum(len(tally.hand) for tally in self.stages.values())

    def tree(self) -> dict[str, Any]:
        """For a progress event."""
        return {
            "seconds": round(self.seconds, 1),
            "done": round(self.done(), 1),
            "total": self.total(),
            "eta": None if self.eta is None else round(self.eta, 1),
            "workers": self.workers(),
            "nodes": self.nodes,
            "stages": {name: tally.tree() for name, tally in self.stages.items()},
        }


def log_lines(state: State) -> list[str]:
    """One line per stage that somebody is at, and one for all."""
    lines = [
        f"{name}: {tally.through():.0f}/{tally.total} {'recordings' if name == 'segment' else 'clips'}, "
        + ", ".join(_words(tally))
        for name, tally in state.stages.items()
        if tally.hand
    ]
    return [*lines, ", ".join([last_line(state), *_all(state)])]


def last_line(state: State) -> str:
    """`build: 120/960 clip stages, 34 s`."""
    unit = "recordings" if all(name == "segment" for name in state.stages) else "clip stages"
    return f"build: {state.done():.0f}/{state.total()} {unit}, {state.seconds:.0f} s"


def screen_lines(state: State, columns: int, rows: int) -> list[str]:
    """A line per stage, and one for all; on a terminal of few rows the stages that are through give way."""
    shown = dict(state.stages)
    if len(shown) + 2 > rows:
        shown = {name: tally for name, tally in shown.items() if tally.hand or tally.through() < tally.total}
    if len(shown) + 2 > rows:
        shown = {name: tally for name, tally in shown.items() if tally.hand}
    lines = [_line(name, tally.through(), tally.total, _words(tally), columns) for name, tally in shown.items()]
    return [*lines, _line("all", state.done(), state.total(), [clock(state.seconds), *_all(state)], columns)]


def _line(name: str, done: float, total: int, words: list[str], columns: int) -> str:
    bar = ""
    if columns >= NARROW:
        full = int(BAR * done / total) if total else BAR
        bar = f"[{'#' * full}{'.' * (BAR - full)}] "
    return f"{name:<{NAME}}{bar}{f'{done:.0f}/{total}':>13}  {', '.join(words)}".rstrip()


def _words(tally: Tally) -> list[str]:
    """Of one stage, what matters most first: a narrow terminal cuts the end off."""
    if tally.through() >= tally.total:
        words = ["done"]
    else:
        rate, eta = tally.rate(), tally.eta()
        words = [f"{rate:.3g} clips/s" if rate is not None else "waiting" if not tally.hand else "begun"]
        words += [f"ETA {clock(eta)}"] if eta is not None else []
    if tally.quarantined():
        words.append(f"{tally.quarantined()} quarantined")
    if tally.hand:
        words.append(count(len(tally.hand), "worker"))
        cpu, gpu = tally.cpu(), tally.gpu()
        words += [f"CPU {cpu:.1f}"] if cpu is not None else []
        words += [f"GPU {gpu:.0%}"] if gpu is not None else []
    return words


def _all(state: State) -> list[str]:
    words = [f"ETA {clock(state.eta)}"] if state.eta is not None else []
    workers = count(state.workers(), "worker")
    return [*words, f"{workers} on {count(state.nodes, 'machine')}" if state.nodes else workers]

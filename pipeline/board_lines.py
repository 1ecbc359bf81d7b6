"""A build's progress in words: lines for a terminal and for a log."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.tally import Tally
from pipeline.words import count

NAME, BAR, NARROW = 11, 20, 76
"""Letters of a stage's name and of a bar; with fewer columns than NARROW there is no bar."""


def clock(seconds: float) -> str:
    """`0:07`, `12:30` or `3:04:05`."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def log_lines(stages: Mapping[str, Tally], seconds: float, eta: float | None, nodes: int) -> list[str]:
    """One line per stage that somebody is at, and one for all."""
    lines = [
        f"{name}: {tally.through():.0f}/{tally.total} {_unit(name)}, {', '.join(_words(tally))}"
        for name, tally in stages.items()
        if tally.hand
    ]
    return [*lines, ", ".join([last_line(stages, seconds), *_all(stages, eta, nodes)])]


def last_line(stages: Mapping[str, Tally], seconds: float) -> str:
    """`build: 120/960 clip stages, 34 s`."""
    scans = all(name == "segment" for name in stages)
    done, total = sum(tally.through() for tally in stages.values()), sum(tally.total for tally in stages.values())
    return f"build: {done:.0f}/{total} {'recordings' if scans else 'clip stages'}, {seconds:.0f} s"


def screen_lines(
    stages: Mapping[str, Tally], seconds: float, eta: float | None, nodes: int, columns: int, rows: int
) -> list[str]:
    """A line per stage, and one for all; on a terminal of few rows the stages that are through give way."""
    shown = dict(stages)
    if len(shown) + 2 > rows:
        shown = {name: tally for name, tally in stages.items() if tally.hand or tally.through() < tally.total}
    if len(shown) + 2 > rows:
        shown = {name: tally for name, tally in shown.items() if tally.hand}
    lines = [_line(name, tally.through(), tally.total, _words(tally), columns) for name, tally in shown.items()]
    done, total = sum(tally.through() for tally in stages.values()), sum(tally.total for tally in stages.values())
    words = [clock(seconds), *_all(stages, eta, nodes)]
    return [*lines, _line("all", done, total, words, columns)]


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
        words.append(f"CPU {tally.cpu():.1f}")
        gpu = tally.gpu()
        words += [f"GPU {gpu:.0%}"] if gpu is not None else []
    return words


def _all(stages: Mapping[str, Tally], eta: float | None, nodes: int) -> list[str]:
    workers = sum(len(tally.hand) for tally in stages.values())
    words = [f"ETA {clock(eta)}"] if eta is not None else []
    return [*words, f"{count(workers, 'worker')} on {count(nodes, 'machine')}" if nodes else count(workers, "worker")]


def _unit(stage: str) -> str:
    return "recordings" if stage == "segment" else "clips"

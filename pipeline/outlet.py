"""Where a build's progress goes: a terminal, a log, or JSON events; always standard error."""

from __future__ import annotations

import json
import sys
from datetime import datetime, timezone
from typing import Any

from pipeline.board_lines import State, last_line, log_lines, screen_lines
from pipeline.run_record import stamp
from pipeline.screen import Screen, can_redraw
from pipeline.words import printable
from shards.progress import LOG_EVERY

DRAW_EVERY = 0.2
"""Seconds between two pictures on a terminal, at least."""


class Outlet:
    """Shows states and says lines.

    Args:
        events: JSON lines instead of text.
        quiet: say nothing.
        now: seconds of the clock that `due` goes by.
    """

    def __init__(self, events: bool, quiet: bool, now: float) -> None:
        self._events, self._quiet, self._shown = events and not quiet, quiet, now
        self._screen = Screen(sys.stderr) if not quiet and not events and can_redraw(sys.stderr) else None

    def due(self, now: float) -> bool:
        """Whether it is time to show the state again; if so, it counts as shown."""
        if self._quiet or now - self._shown < (DRAW_EVERY if self._screen else LOG_EVERY):
            return False
        self._shown = now
        return True

    def show(self, state: State) -> None:
        """The state of this moment."""
        if self._screen:
            self._screen.draw(screen_lines(state, *self._screen.size()))
        elif self._events:
            self.tell("progress", **state.tree())
        elif not self._quiet:
            for line in log_lines(state):
                _print(line)

    def clear(self) -> None:
        """Take what is redrawn off the terminal, for others to write there."""
        if self._screen:
            self._screen.clear()

    def say(self, text: str, state: State) -> None:
        """A line for people, whatever names are in it; on a terminal the state is drawn anew below it."""
        if self._quiet or self._events:
            return
        self.clear()
        _print(printable(text))
        if self._screen and state.left():
            self.show(state)

    def tell(self, event: str, **what: Any) -> None:
        """An event for programs."""
        if self._events:
            _print(json.dumps({"event": event, "time": stamp(datetime.now(timezone.utc)), **what}))

    def last(self, state: State) -> None:
        """What remains in a log of a build that went through."""
        if not self._screen and not self._events and not self._quiet:
            _print(last_line(state))


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

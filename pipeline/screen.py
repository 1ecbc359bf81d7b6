"""Lines that stay at the bottom of a terminal and are written over in place."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TextIO

UP, CLEAR_LINE, CLEAR_BELOW = "\x1b[{}A", "\x1b[K", "\x1b[J"


def can_redraw(stream: TextIO) -> bool:
    """Whether a stream is a terminal that moves its cursor."""
    return stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb")


class Screen:
    """A block of lines that is drawn over itself.

    Each picture goes out in one write, and lines are written over before what is left of them is cleared, so nothing
    flickers. No mode of the terminal is changed: a program that is killed leaves the last picture, and a sane terminal.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._drawn: list[int] = []

    def draw(self, lines: Sequence[str]) -> None:
        """Show these lines in place of those shown before; what does not fit the terminal is left out."""
        columns, rows = self.size()
        # The last column stays free: many terminals break a line there.
        shown = [line[: max(1, columns - 1)] for line in lines[-max(1, rows - 1) :]]
        text = "".join(f"{line}{CLEAR_LINE}\n" for line in shown)
        self._write(self._home(columns) + text + CLEAR_BELOW)
        self._drawn = [len(line) for line in shown]

    def clear(self) -> None:
        """Take the lines away."""
        if self._drawn:
            self._write(self._home(self.size()[0]) + CLEAR_BELOW)
            self._drawn = []

    def size(self) -> tuple[int, int]:
        """Columns and rows; 80 by 24 where the terminal does not say."""
        try:
            columns, rows = os.get_terminal_size(self._stream.fileno())
        except (OSError, ValueError):
            return 80, 24
        return (columns or 80), (rows or 24)

    def _home(self, columns: int) -> str:
        """To the first line of the block: a terminal that was made narrower since has broken the lines."""
        rows = sum(max(1, -(-length // columns)) for length in self._drawn)
        return "\r" + (UP.format(rows) if rows else "")

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()

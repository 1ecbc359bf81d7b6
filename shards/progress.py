"""Progress of long work: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

LOG_EVERY = 10.0
"""Seconds between lines where there is no terminal."""


class Progress:
    """Counts up to `total` units of work on standard error.

    Use as a context manager; `advance` after each piece, `note` for lines that must not tear the bar. A quiet one says
    nothing.
    """

    def __init__(self, label: str, total: int, unit: str, quiet: bool = False) -> None:
        self.label, self.total, self.unit, self._quiet = label, total, unit, quiet
        self.done = 0
        self._last = self._begin = time.monotonic()
        self._detail = ""
        self._bar = tqdm(total=total, desc=label, unit=unit, leave=False) if sys.stderr.isatty() and not quiet else None

    def advance(self, count: int = 1, detail: str = "") -> None:
        self.done += count
        self._detail = detail
        if self._bar is not None:
            self._bar.set_postfix_str(detail, refresh=False)
            self._bar.update(count)
        elif not self._quiet and time.monotonic() - self._last >= LOG_EVERY:
            self._last = time.monotonic()
            self._line()

    def note(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        elif not self._quiet:
            print(text, file=sys.stderr, flush=True)

    def _line(self) -> None:
        seconds = time.monotonic() - self._begin
        detail = f" {self._detail}" if self._detail else ""
        print(
            f"{self.label}: {self.done}/{self.total} {self.unit}, {seconds:.0f} s{detail}",
            file=sys.stderr,
            flush=True,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None and self.total:
            self._line()

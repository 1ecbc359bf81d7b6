"""Ctrl-C and SIGTERM: raised where the program is, and kept, since Python drops what is raised inside a destructor."""

from __future__ import annotations

import signal
import threading

_caught: list[int] = []


class Stopped(BaseException):
    """The user or a batch system asks to stop; `number` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def catch_signals() -> None:
    """From now on SIGINT and SIGTERM raise `Stopped`. Only the main thread can handle signals; elsewhere no effect."""
    _caught.clear()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _stop)
        signal.signal(signal.SIGTERM, _stop)


def check_signals() -> None:
    """Raise `Stopped` if a signal came and its exception was lost. Long loops call this."""
    if _caught:
        raise Stopped(_caught[0])


def _stop(number: int, frame: object) -> None:
    _caught.append(number)
    raise Stopped(number)

"""The one exception that a user is meant to read, and the way to warn."""

from __future__ import annotations

import warnings


class UserError(Exception):
    """Something the user can mend: the message says what, where and what to do.

    The command line prints it as one line and exits with status 2, without a traceback.
    """


def warn(text: str) -> None:
    """Say something on standard error while work goes on, each time anew.

    `warnings.warn` shows equal lines only once per place in the code, and that place with them.
    """
    warnings.warn_explicit(text, UserWarning, "faces2voices", 1)

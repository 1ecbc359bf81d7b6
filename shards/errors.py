"""The one exception that a user is meant to read."""


class UserError(Exception):
    """Something the user can mend: the message says what, where and what to do.

    The command line prints it as one line and exits with status 2, without a traceback.
    """

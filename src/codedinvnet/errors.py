"""The one exception that the command line turns into a message instead of a traceback."""

from __future__ import annotations


class UserError(Exception):
    """A mistake the user can mend.

    The command line prints its message, which is one line, and exits with code 2.
    """

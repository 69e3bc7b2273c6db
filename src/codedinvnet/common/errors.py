"""The one exception that the command line turns into a message, and what its messages need."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class UserError(Exception):
    """A mistake the user can mend.

    The command line prints its message, which is one line, and exits with code 2.
    """


def nearest(given: str, known: Iterable[str]) -> str | None:
    """Return the name that was most likely meant, whatever its case; None if none is near."""
    by_lower = {name.lower(): name for name in sorted(known)}
    near = difflib.get_close_matches(given.lower(), by_lower, n=1, cutoff=0.5)
    return by_lower[near[0]] if near else None


def one_line(error: BaseException) -> str:
    """Return what an error of a library says, as one line; its kind if it says nothing."""
    lines = re.sub(r"\x1b\[[\d;]*m", "", str(error)).strip().splitlines()  # PyTorch's have colours
    return lines[0].strip() if lines else type(error).__name__


def described(error: BaseException) -> str:
    """Return an error's kind and message."""
    return f"{type(error).__name__}: {error}"

"""A progress bar; where no one watches it, a line of a log at most every minute."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from tqdm import tqdm

EVERY = 60.0
"""Seconds between two lines of a log."""


class _Lines:
    """Makes a line of what a bar draws over and over, and leaves most out.

    Args:
        stream: the log.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.due = stream, time.monotonic() + EVERY
        self.encoding = getattr(stream, "encoding", None)

    def write(self, drawn: str) -> None:
        """Write a line, if one is due."""
        line = drawn.replace("\r", "").replace("\x1b[A", "").strip()
        now = time.monotonic()
        if line and now >= self.due:
            self.due = now + EVERY
            self.stream.write(line + "\n")

    def flush(self) -> None:
        """Have it written."""
        self.stream.flush()


class Progress(tqdm):  # type: ignore[misc]
    """A bar of tqdm's, on standard error; in a log a line a minute, and one in the end.

    The end of a bar that does not stay (`leave=False`) has none. A bar that is `watched` only where
    somebody watches has no lines in a log.
    """

    def __init__(
        self, *args: Any, file: TextIO | None = None, watched: bool = False, **options: Any
    ) -> None:
        stream = sys.stderr if file is None else file
        self._lines = None if stream.isatty() else _Lines(stream)
        if self._lines is not None:
            options |= {"mininterval": EVERY, "maxinterval": EVERY}
            options["disable"] = watched or options.get("disable", False)
        super().__init__(*args, file=self._lines or stream, **options)

    def close(self) -> None:
        """End the bar."""
        if self._lines is not None and not self.disable:
            self._lines.due = 0.0 if self.leave else float("inf")
        super().close()

"""Structured logs: one JSON object a line."""

from __future__ import annotations

import json
import logging
import math
import time
from typing import Any

QUIET = 1.0
"""Seconds between two lines of a kind of which there may be thousands."""
LASTING = 60.0
"""Seconds between two lines of a condition that lasts."""


class JsonLines(logging.Formatter):
    """One JSON object a line: time (UTC), level, event, and the record's `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = getattr(record, "fields", {})
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **fields,
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


logger = logging.getLogger("codedinvnet.serving")


def log_event(
    event: str, level: int = logging.INFO, error: BaseException | None = None, **fields: Any
) -> None:
    """Log one event; of an error with its traceback."""
    logger.log(level, event, exc_info=error, extra={"fields": fields})


class Quiet:
    """Logs an event once in a while at most, with how many were left out since the last.

    Args:
        seconds: between two lines.
    """

    def __init__(self, seconds: float = QUIET) -> None:
        self.seconds = seconds
        self._next = -math.inf
        self._left_out = 0

    def log(self, event: str, level: int, **fields: Any) -> None:
        """Log one event, or count it."""
        now = time.monotonic()
        if now < self._next <= now + self.seconds:  # no clock that goes back silences it
            self._left_out += 1
            return
        if self._left_out:
            fields["left_out"] = self._left_out
        self._next, self._left_out = now + self.seconds, 0
        log_event(event, level, **fields)


class Lasting:
    """Logs a condition that lasts: when it begins, for another reason, and once in `LASTING` s."""

    def __init__(self) -> None:
        self._logged: dict[str, float] = {}
        """Reason -> when it was logged last."""

    def log(self, event: str, level: int, *, reason: str, **fields: Any) -> None:
        """Log that the condition stands, unless its reason was logged a short while ago."""
        now = time.monotonic()
        self._logged = {known: at for known, at in self._logged.items() if now < at + LASTING}
        if reason not in self._logged:
            self._logged[reason] = now
            log_event(event, level, reason=reason, **fields)

    def end(self) -> None:
        """Record that the condition is over."""
        self._logged.clear()

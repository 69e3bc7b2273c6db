"""What clients get for each kind of error, over HTTP and gRPC."""

from __future__ import annotations

import logging
from typing import NamedTuple

from codedinvnet.common.errors import described
from codedinvnet.net.answers import Reply, error_reply
from codedinvnet.net.http1 import Field
from codedinvnet.net.logs import log_event
from codedinvnet.net.protocol.messages import ProtocolError, TooLarge
from codedinvnet.serving.answers import DeadlinePassed, InputRefused, NotNow, QueryFailed
from codedinvnet.serving.service import NoModel

LEFT = 499
"""The status of a request whose client is gone."""


class HttpError(Exception):
    """An error that only HTTP has: a wrong path or method, or what a browser must not do."""

    def __init__(self, status: int, reason: str, *fields: Field) -> None:
        super().__init__(reason)
        self.status, self.fields = status, fields


class Unauthenticated(Exception):
    """A token is missing or wrong."""


class TooSlow(Exception):
    """A request's message did not come in time."""


class ClientGone(Exception):
    """The client hung up before it was answered."""


class Problem(NamedTuple):
    """An error as clients see it."""

    http: int
    grpc: str
    """The name of the status."""
    message: str
    fields: tuple[Field, ...] = ()

    def reply(self) -> Reply:
        """Return it as an answer over HTTP."""
        return error_reply(self.http, self.message, *self.fields)


STATUSES: tuple[tuple[type[Exception], int, str], ...] = (
    (TooLarge, 413, "INVALID_ARGUMENT"),
    (ProtocolError, 400, "INVALID_ARGUMENT"),
    (InputRefused, 400, "INVALID_ARGUMENT"),
    (DeadlinePassed, 504, "DEADLINE_EXCEEDED"),
    (QueryFailed, 500, "INTERNAL"),
    (NotNow, 503, "UNAVAILABLE"),
    (TooSlow, 408, "DEADLINE_EXCEEDED"),
    (NoModel, 404, "NOT_FOUND"),
    (Unauthenticated, 401, "UNAUTHENTICATED"),
    (ClientGone, LEFT, "CANCELLED"),
)


def problem(error: Exception, path: str) -> Problem:
    """Return an error as clients see it; a mistake of our own is logged with the path."""
    if isinstance(error, HttpError):
        return Problem(error.status, "UNKNOWN", str(error), error.fields)
    found = next((row for row in STATUSES if isinstance(error, row[0])), None)
    if found is None:
        log_event("internal error", logging.ERROR, error, path=path, reason=described(error))
        return Problem(500, "INTERNAL", f"internal error: {type(error).__name__}")
    if isinstance(error, NotNow):
        again = (b"Retry-After", b" %d" % error.seconds)
        return Problem(found[1], found[2], f"{error}: try again later", (again,))
    return Problem(found[1], found[2], str(error))

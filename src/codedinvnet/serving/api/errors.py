"""What clients get for each kind of error, over HTTP and gRPC."""

from __future__ import annotations

import logging
from typing import NamedTuple

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from codedinvnet.common.errors import described
from codedinvnet.net.logs import log_event
from codedinvnet.protocol.messages import ProtocolError, TooLarge
from codedinvnet.serving.answers import DeadlinePassed, NotNow, QueryFailed
from codedinvnet.serving.api.bodies import TooSlow
from codedinvnet.serving.service import NoModel


class Unauthenticated(Exception):
    """A token is missing or wrong."""


class Problem(NamedTuple):
    """An error as clients see it."""

    http: int
    grpc: str
    """The name of the status."""
    message: str
    headers: dict[str, str]

    def response(self) -> Response:
        """Return it as an answer over HTTP."""
        return JSONResponse({"error": self.message}, self.http, self.headers)


STATUSES: tuple[tuple[type[Exception], int, str], ...] = (
    (TooLarge, 413, "INVALID_ARGUMENT"),
    (ProtocolError, 400, "INVALID_ARGUMENT"),
    (DeadlinePassed, 504, "DEADLINE_EXCEEDED"),
    (QueryFailed, 500, "INTERNAL"),
    (NotNow, 503, "UNAVAILABLE"),
    (TooSlow, 408, "DEADLINE_EXCEEDED"),
    (NoModel, 404, "NOT_FOUND"),
    (Unauthenticated, 401, "UNAUTHENTICATED"),
    (ClientDisconnect, 499, "CANCELLED"),
)


def problem(error: Exception, path: str) -> Problem:
    """Return an error as clients see it; a mistake of our own is logged with the path."""
    if isinstance(error, HTTPException):
        return Problem(error.status_code, "UNKNOWN", error.detail, dict(error.headers or {}))
    found = next((row for row in STATUSES if isinstance(error, row[0])), None)
    if found is None:
        log_event("internal error", logging.ERROR, error, path=path, reason=described(error))
        return Problem(500, "INTERNAL", f"internal error: {type(error).__name__}", {})
    headers, message = {}, str(error)
    if isinstance(error, NotNow):
        headers, message = {"Retry-After": str(error.seconds)}, f"{error}: try again later"
    elif isinstance(error, TooSlow):
        headers = {"Connection": "close"}  # the rest may still come
    elif isinstance(error, Unauthenticated):
        headers = {"WWW-Authenticate": "Bearer"}
    return Problem(found[1], found[2], message, headers)

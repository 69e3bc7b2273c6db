"""Statuses of HTTP and gRPC that mean the same."""

from __future__ import annotations

PAIRS = (
    (400, 3), (401, 16), (403, 7), (404, 5), (504, 4), (408, 4), (409, 6), (412, 9), (413, 11),
    (415, 3), (422, 3), (429, 8), (500, 13), (500, 2), (501, 12), (503, 14),
)  # fmt: skip
"""Of an HTTP and a gRPC status; of several with one's status the first is the other's."""


def grpc_status(status: int) -> int:
    """Return the gRPC code that means the same as an HTTP status."""
    if status < 400:
        return 0
    return next((code for http, code in PAIRS if http == status), 3 if status < 500 else 13)


def http_status(code: int) -> int:
    """Return the HTTP status that means the same as a gRPC code."""
    return 200 if code == 0 else next((http for http, grpc in PAIRS if grpc == code), 500)

"""The spans of a request: its own, and one for each attempt.

Their attributes are those of OpenTelemetry's semantic conventions for HTTP and gRPC.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from codedinvnet.net.client import Origin
from codedinvnet.net.tracing import Tracer, carried, fail

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span

KIND, OUTCOME = "codedinvnet.attempt", "codedinvnet.outcome"
METHOD, STATUS = "http.request.method", "http.response.status_code"
ERROR = "error.type"
FAULTS = frozenset({"failed", "deadline", "refused", "aborted"})
"""Outcomes of requests that are not their clients' doing."""
METHODS = frozenset(
    ("CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "QUERY", "TRACE")
)
"""Others have no name in traces: clients make them up."""


class RequestTrace:
    """The span of a request.

    Args:
        tracer: makes the spans.
        name: of the spans.
        fields: of the request's header, their names in lower case.
        shared: attributes of this span and those of the attempts.
        own: further attributes of this span.
        path: of the request; "" if attempts have no URL.

    Attributes:
        id: of the trace.
    """

    def __init__(
        self,
        tracer: Tracer,
        name: str,
        fields: Mapping[str, str],
        shared: Mapping[str, str],
        own: Mapping[str, str],
        path: str = "",
    ) -> None:
        self._tracer, self._name, self._shared, self._path = tracer, name, shared, path
        self._is_http = METHOD in shared
        self.span, self._context = tracer.request(name, fields, {**shared, **own})
        self.id = f"{self.span.get_span_context().trace_id:032x}"

    def attempt(self, earlier: int, is_copy: bool, origin: Origin) -> AttemptTrace:
        """Begin the span of an attempt.

        Args:
            earlier: attempts that were made before.
            is_copy: whether it is made because these are late.
            origin: the upstream.
        """
        about: dict[str, str | int] = {
            **self._shared,
            KIND: "hedge" if is_copy else "retry" if earlier else "first",
            "server.address": origin.name,
            "server.port": origin.port,
        }
        if self._path:
            base = f"{origin.scheme}://{origin.authority}{origin.path}"
            about["url.full"] = base + self._path
            if earlier:
                about["http.request.resend_count"] = earlier
        span = self._tracer.attempt(self._name, self._context, about)
        return AttemptTrace(span, self._context, self._is_http)

    def end(self, outcome: str, status: int) -> None:
        """End it by how the request ended, and the status that its client got; 0: none."""
        span = self.span
        span.set_attribute(OUTCOME, outcome)
        if status and self._is_http:
            span.set_attribute(STATUS, status)
        if status >= 500 or outcome in FAULTS:
            span.set_attribute(ERROR, str(status) if outcome == "direct" else outcome)
            fail(span, outcome)
        span.end()


class AttemptTrace:
    """The span of an attempt.

    Attributes:
        fields: of the header by which the upstream continues the trace.
    """

    def __init__(self, span: Span, above: Context, is_http: bool) -> None:
        self.span, self.fields, self._is_http = span, carried(span, above), is_http

    def end(self, result: str, status: int, has_won: bool, reason: str) -> None:
        """End it.

        Args:
            result: how the attempt ended, as metrics have it.
            status: of HTTP; 0: none.
            has_won: whether the client got its answer.
            reason: of a failure, in words.
        """
        span, is_failure = self.span, result not in ("ok", "error", "cancelled")
        outcome = "won" if has_won else "lost"
        if is_failure or result == "cancelled":
            outcome = "failed" if is_failure else result
        span.set_attribute(OUTCOME, outcome)
        if status and self._is_http:
            span.set_attribute(STATUS, status)
        if is_failure or status >= 400:
            has_code = self._is_http and status >= 400
            span.set_attribute(ERROR, str(status) if has_code else result)
            fail(span, reason)
        span.end()

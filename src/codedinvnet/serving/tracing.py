"""The spans of a service: one for each request, and below it one for each attempt.

A query remembers the request that it came with (`current_request`), and the front end hands each
call of a worker to `Tracing.attempt`, if there is one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from codedinvnet.net.tracing import Tracer, fail

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span

    from codedinvnet.serving.workers.pool import Result

OUTCOME, RESULT = "codedinvnet.outcome", "codedinvnet.result"
WORKER = "codedinvnet.worker"


@dataclass
class RequestSpan:
    """A request that is traced, with the spans of its attempts by task and queries."""

    span: Span
    context: Context
    attempts: dict[tuple[int, tuple[int, ...]], list[Span]] = field(default_factory=dict)
    outcomes: Counter[str] = field(default_factory=Counter)

    def failed(self, reason: str) -> None:
        """Say that the service is at fault."""
        fail(self.span, reason)

    def ended(self, status: int) -> None:
        """Take down the HTTP status of its answer."""
        self.span.set_attribute("http.response.status_code", status)
        if status >= 500:
            self.failed(f"HTTP status {status}")


_request: ContextVar[RequestSpan | None] = ContextVar("request", default=None)


def current_request() -> RequestSpan | None:
    """Return the request that is being answered, if it is traced."""
    return _request.get()


class Tracing:
    """Has the requests of a service traced."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    @contextmanager
    def request(
        self, name: str, headers: Iterable[tuple[str, str]], attributes: Mapping[str, str]
    ) -> Iterator[RequestSpan]:
        """Trace a request while the body runs, as part of its client's trace if there is one."""
        span, context = self._tracer.request(name, dict(headers), attributes)
        found = RequestSpan(span, context)
        token = _request.set(found)
        try:
            yield found
        finally:
            _request.reset(token)
            for outcome, count in found.outcomes.items():
                span.set_attribute(f"{OUTCOME}.{outcome}", count)
            if len(found.outcomes) == 1:
                span.set_attribute(OUTCOME, next(iter(found.outcomes)))
            span.end()

    async def attempt(
        self,
        call: Awaitable[Result],
        kind: str,
        worker: int,
        task: int,
        queries: tuple[int, ...],
        requests: Sequence[RequestSpan | None],
    ) -> Result:
        """Return a worker's result; its span is below the first of the requests that are traced."""
        from opentelemetry.trace import Link

        known = list({id(request): request for request in requests if request}.values())
        if not known:
            return await call
        earlier = known[0].attempts.setdefault((task, queries), [])
        name = "attempt" if kind == "data" else kind
        if earlier:
            name = "hedge" if any(span.is_recording() for span in earlier) else "retry"
        linked = [*(request.span for request in known[1:]), *earlier]
        span = self._tracer.attempt(
            name,
            known[0].context,
            {WORKER: worker, "codedinvnet.queries": len(queries), RESULT: "ok"},
            [Link(other.get_span_context()) for other in linked],
        )
        earlier.append(span)
        try:
            return await call
        except BaseException as error:  # the pool's, and its being stopped
            span.set_attribute(RESULT, "failed")
            fail(span, str(error) or type(error).__name__)
            raise
        finally:
            span.end()

"""OpenTelemetry traces: a span for each request, and below it one for each attempt.

A query remembers the request that it came with (`current_request`), and the front end hands each
call of a worker to `Tracing.attempt`, if there is one. OpenTelemetry is imported only then.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from codedinvnet.common.errors import UserError

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

    from codedinvnet.serving.workers.pool import Result

PATH = "/v1/traces"
"""Where a collector takes traces (OTLP over HTTP)."""
NAME = "codedinvnet"
"""The service's name in traces, unless the environment has another."""
LAST_WAIT = 2.0
"""Seconds for the last spans when the service stops, though the collector does not answer."""
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
        from opentelemetry.trace import StatusCode

        self.span.set_status(StatusCode.ERROR, reason)

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
    """Makes the spans of a service."""

    def __init__(self, provider: TracerProvider) -> None:
        self.tracer = provider.get_tracer(NAME)

    @contextmanager
    def request(
        self, name: str, headers: Iterable[tuple[str, str]], attributes: Mapping[str, str]
    ) -> Iterator[RequestSpan]:
        """Trace a request while the body runs, as part of its client's trace if there is one."""
        from opentelemetry import propagate
        from opentelemetry.trace import SpanKind, set_span_in_context

        theirs = propagate.extract(dict(headers))
        span = self.tracer.start_span(name, theirs, SpanKind.SERVER, attributes)
        found = RequestSpan(span, set_span_in_context(span, theirs))
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
        from opentelemetry.trace import Link, SpanKind, StatusCode

        known = list({id(request): request for request in requests if request}.values())
        if not known:
            return await call
        earlier = known[0].attempts.setdefault((task, queries), [])
        name = "attempt" if kind == "data" else kind
        if earlier:
            name = "hedge" if any(span.is_recording() for span in earlier) else "retry"
        linked = [*(request.span for request in known[1:]), *earlier]
        span = self.tracer.start_span(
            name,
            known[0].context,
            SpanKind.CLIENT,
            {WORKER: worker, "codedinvnet.queries": len(queries), RESULT: "ok"},
            [Link(other.get_span_context()) for other in linked],
        )
        earlier.append(span)
        try:
            return await call
        except BaseException as error:  # the pool's, and its being stopped
            span.set_attribute(RESULT, "failed")
            span.set_status(StatusCode.ERROR, str(error) or type(error).__name__)
            raise
        finally:
            span.end()


@asynccontextmanager
async def exporting(collector: str | None) -> AsyncIterator[Tracing | None]:
    """Yield what sends traces to a collector (OTLP over HTTP) meanwhile; None without one.

    Raises:
        UserError: if the URL is none, or OpenTelemetry is not installed.
    """
    if collector is None:
        yield None
        return
    try:
        parts = urlsplit(collector)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:  # of an address in brackets
        is_address = False
    if not is_address:
        raise UserError(
            f"--set traces: {collector!r} is not http://HOST:4318, a collector's address"
        )
    try:
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        exporter = exporter_to(collector)
    except ImportError as error:
        why = f"--set traces: needs OpenTelemetry: pip install 'codedinvnet[otel]' ({error})"
        raise UserError(why) from error
    resource = Resource.create()  # of the environment
    if "OTEL_SERVICE_NAME" not in os.environ and "service.name=" not in os.environ.get(
        "OTEL_RESOURCE_ATTRIBUTES", ""
    ):
        resource = resource.merge(Resource({SERVICE_NAME: NAME}))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    try:
        yield Tracing(provider)
    finally:
        stopping = asyncio.ensure_future(asyncio.to_thread(provider.shutdown))
        await asyncio.wait({stopping}, timeout=LAST_WAIT)
        if not stopping.done():
            exporter.shutdown()  # ends its tries
        await stopping


def exporter_to(collector: str) -> SpanExporter:
    """Return what sends spans to a collector; the environment has what else there is to say."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter(endpoint=collector.rstrip("/").removesuffix(PATH) + PATH)

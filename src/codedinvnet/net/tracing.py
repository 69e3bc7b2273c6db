"""OpenTelemetry: spans that continue clients' traces, sent to a collector in the background.

The environment says whether and where, by the variables that OpenTelemetry defines. If it doesn't,
nothing of OpenTelemetry is imported.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from codedinvnet.common.errors import UserError
from codedinvnet.net.background import apart
from codedinvnet.net.client import parse_origin
from codedinvnet.net.logs import log_event

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Link, Span
    from opentelemetry.util.types import AttributeValue

NAME = "codedinvnet"
"""The service's name in traces, unless the environment has another."""
LAST_WAIT = 2.0
"""Seconds for the last spans when the service stops, though the collector does not answer."""
NOISY = ("opentelemetry",)
"""Loggers of which only errors are worth a line."""


class Tracer:
    """Makes the spans of requests, and of the attempts to have them answered.

    Attributes:
        fields: names of the header fields that carry a trace, in lower case.
    """

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry import propagate

        self._tracer = provider.get_tracer(NAME)
        self.fields = frozenset(name.lower() for name in propagate.get_global_textmap().fields)

    def request(
        self, name: str, fields: Mapping[str, str], attributes: Mapping[str, AttributeValue]
    ) -> tuple[Span, Context]:
        """Begin the span of a request, as part of its client's trace if there is one.

        Args:
            name: of the span.
            fields: of the request's header, their names in lower case.
            attributes: of the span.
        """
        from opentelemetry import propagate
        from opentelemetry.trace import SpanKind, set_span_in_context

        theirs = propagate.extract(fields)
        span = self._tracer.start_span(name, theirs, SpanKind.SERVER, attributes)
        return span, set_span_in_context(span, theirs)

    def attempt(
        self,
        name: str,
        above: Context,
        attributes: Mapping[str, AttributeValue],
        links: Sequence[Link] = (),
    ) -> Span:
        """Begin the span of an attempt."""
        from opentelemetry.trace import SpanKind

        return self._tracer.start_span(name, above, SpanKind.CLIENT, attributes, links)


def fail(span: Span, reason: str) -> None:
    """Say that what a span is of has failed."""
    from opentelemetry.trace import StatusCode

    span.set_status(StatusCode.ERROR, reason)


def carried(span: Span, above: Context) -> dict[str, str]:
    """Return the header fields by which a server continues the trace below a span."""
    from opentelemetry import propagate
    from opentelemetry.trace import set_span_in_context

    fields: dict[str, str] = {}
    propagate.inject(fields, set_span_in_context(span, above))
    return fields


@asynccontextmanager
async def exporting() -> AsyncIterator[Tracer | None]:
    """Yield what makes spans, and send them meanwhile; None if the environment asks for none."""
    exporter = open_exporter()
    if exporter is None:
        yield None
        return
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create()  # of the environment
    if not _said("OTEL_SERVICE_NAME") and "service.name=" not in _said("OTEL_RESOURCE_ATTRIBUTES"):
        resource = resource.merge(Resource({SERVICE_NAME: NAME}))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    try:
        yield Tracer(provider)
    finally:
        stopping = apart(provider.shutdown, "traces")
        await asyncio.wait({stopping}, timeout=LAST_WAIT)
        if not stopping.done():
            exporter.shutdown()  # ends its tries


def open_exporter() -> SpanExporter | None:
    """Return what sends spans as the environment says; None if it asks for none, or in vain."""
    endpoint = _said("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    kind = _said("OTEL_TRACES_EXPORTER")
    protocol = _said("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    is_off = _said("OTEL_SDK_DISABLED").lower() == "true" or kind == "none"
    if is_off or not (endpoint or kind):
        return None
    try:
        if kind not in ("", "otlp"):
            raise UserError(f"OTEL_TRACES_EXPORTER: {kind!r} is not otlp")
        if protocol not in ("", "http/protobuf"):
            raise UserError(f"OTEL_EXPORTER_OTLP_PROTOCOL: {protocol!r} is not http/protobuf")
        if endpoint:
            parse_origin(endpoint, "OTEL_EXPORTER_OTLP_ENDPOINT")
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        return OTLPSpanExporter()
    except ImportError as error:
        why = f"OpenTelemetry is missing: pip install 'codedinvnet[otel]' ({error})"
    except (UserError, ValueError, OSError) as error:  # of its variables
        why = str(error)
    log_event("traces are off", logging.WARNING, reason=why)
    return None


def _said(*names: str) -> str:
    """Return the first of some variables that is set, without blanks; "" if none is."""
    return next(filter(None, (os.environ.get(name, "").strip() for name in names)), "")

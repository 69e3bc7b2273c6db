"""A collector of OpenTelemetry's traces: spans come over OTLP and HTTP."""

from __future__ import annotations

import asyncio
from typing import Any, NamedTuple

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span as Sent
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from tests.upstream import Request, Upstream, answer


class Span(NamedTuple):
    """What a collector was sent of a span."""

    name: str
    is_server: bool
    trace: str
    id: str
    parent: str
    attributes: dict[str, Any]
    has_failed: bool
    links: list[str]
    service: str


def values(attributes: Any) -> dict[str, Any]:
    """Return attributes by name."""
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}


class Collector(Upstream):
    """Keeps the spans that it is sent; as soon as they are here, they are in `spans`.

    Attributes:
        hangs: whether it never answers.
    """

    def __init__(self, hangs: bool = False) -> None:
        super().__init__(self.take)
        self.hangs = hangs
        self.spans: list[Span] = []

    async def take(self, request: Request, _: asyncio.StreamWriter) -> bytes:
        assert (request.method, request.path) == ("POST", "/v1/traces")
        if self.hangs:
            await asyncio.sleep(3600)
        for resource in ExportTraceServiceRequest.FromString(request.body).resource_spans:
            service = values(resource.resource.attributes)["service.name"]
            for scope in resource.scope_spans:
                self.spans += [span_of(each, service) for each in scope.spans]
        return answer(b"")

    def split(self) -> tuple[list[Span], list[Span]]:
        """Return the spans of requests and those of attempts."""
        return [s for s in self.spans if s.is_server], [s for s in self.spans if not s.is_server]


def span_of(sent: Sent, service: str) -> Span:
    """Return what is known of a span."""
    return Span(
        sent.name,
        sent.kind == Sent.SPAN_KIND_SERVER,
        sent.trace_id.hex(),
        sent.span_id.hex(),
        sent.parent_span_id.hex(),
        values(sent.attributes),
        sent.status.code == Status.STATUS_CODE_ERROR,
        [link.span_id.hex() for link in sent.links],
        service,
    )

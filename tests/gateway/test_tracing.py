"""Traces of a gateway: a span for each request, and below it one for each attempt."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.collector import Collector, Span
from tests.gateway.support import INFER, V2, Upstream, answer, gateway, process
from tests.gateway.test_grpc import ECHO
from tests.gateway.test_grpc import Upstream as GrpcUpstream
from tests.gateway.test_grpc import echo as grpc_echo
from tests.gateway.test_grpc import gateway as grpc_gateway
from tests.observing import until
from tests.upstream import Request, saying

TRACE, PARENT, STATE = "1" * 32, "2" * 16, "a=1,b=2"
SENT: dict[str, str] = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": STATE}
ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


@pytest.fixture
async def collector(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Collector]:
    async with Collector() as found:
        monkeypatch.setenv(ENDPOINT, found.url)
        yield found


def told(upstreams: list[Upstream]) -> list[str]:
    """Return what upstreams were told of the trace that they are part of."""
    return [request.fields["traceparent"] for each in upstreams for request in each.requests]


def below(request: Span, attempts: list[Span]) -> list[str]:
    """Return what the upstreams of attempts are told that are below a request."""
    assert {(span.trace, span.parent) for span in attempts} == {(TRACE, request.id)}
    return [f"00-{TRACE}-{span.id}-01" for span in attempts]


class First:
    """Treats the first request that any upstream gets unlike all others."""

    def __init__(self, status: int = 0) -> None:
        self.status, self.count = status, 0

    async def __call__(self, *_: object) -> bytes:
        self.count += 1
        if self.count > 1:
            return answer(INFER)
        if not self.status:
            await asyncio.sleep(3600)
        return answer(b"no", self.status)


@pytest.mark.parametrize(
    ("first", "loser", "winner"),
    [
        (0, ("first", "cancelled", None, False), "hedge"),
        (500, ("first", "failed", "500", True), "retry"),
    ],
)
async def test_each_attempt_has_a_span_below_that_of_its_request(
    collector: Collector, first: int, loser: tuple[Any, ...], winner: str
) -> None:
    handler = First(first)
    options: dict[str, Any] = {"hedge_delay_ms": "5:20", "cancel": "close"}
    async with gateway(Upstream(handler), Upstream(handler), **options) as g:
        assert (await g.ask("POST", f"{V2}?secret=1", INFER, **SENT)).body == INFER
        asked = told(g.upstreams)
        states = [r.fields["tracestate"] for each in g.upstreams for r in each.requests]
        ports = {upstream.port for upstream in g.upstreams}
    (request,), attempts = collector.split()
    assert (request.trace, request.parent, request.has_failed) == (TRACE, PARENT, False)
    assert (request.name, request.service) == (f"POST {V2}", "codedinvnet")
    assert request.attributes == {
        "http.request.method": "POST",
        "http.route": V2,
        "http.response.status_code": 200,
        "url.path": V2,
        "client.address": "127.0.0.1",
        "codedinvnet.outcome": "direct",
    }
    assert len(set(asked)) == 2
    assert sorted(asked) == sorted(below(request, attempts))
    assert states == [STATE] * 2
    attempts.sort(key=lambda span: span.attributes["codedinvnet.attempt"])
    seen = [span.attributes for span in attempts]
    names = "codedinvnet.attempt", "codedinvnet.outcome", "error.type"
    kinds = [(*map(span.attributes.get, names), span.has_failed) for span in attempts]
    assert kinds == [loser, (winner, "won", None, False)]
    assert {each["server.port"] for each in seen} == ports
    assert {each["server.address"] for each in seen} == {"127.0.0.1"}
    assert seen[1]["http.response.status_code"] == 200
    assert seen[1]["url.full"] == f"http://127.0.0.1:{seen[1]['server.port']}{V2}"


async def test_failures_of_the_gateway_and_the_clients_mistakes(collector: Collector) -> None:
    async def reply(request: Request, _: object) -> bytes:
        return answer(b"", int(request.path[1:]))

    async with gateway(reply, deadline_ms=500.0) as g:
        for status in (404, 500):
            assert (await g.ask("PURGE", f"/{status}")).status == status
        await g.upstreams[0].stop()
        assert (await g.ask("POST", "/200")).status == 504
        assert (await g.ask("POST", "/200")).status == 503
    requests, attempts = collector.split()
    outcomes = [
        (span.attributes["codedinvnet.outcome"], span.has_failed, span.name) for span in requests
    ]
    assert outcomes[:2] == [("direct", False, "HTTP"), ("direct", True, "HTTP")]
    assert outcomes[2:] == [("deadline", True, "POST"), ("refused", True, "POST")]
    assert {span.attributes["http.request.method"] for span in requests} == {"_OTHER", "POST"}
    assert [span.attributes.get("error.type") for span in attempts[:2]] == ["404", "500"]
    assert [span.attributes["codedinvnet.outcome"] for span in attempts[:2]] == ["won", "failed"]
    assert len({span.trace for span in requests}) == len(requests)


async def test_calls_over_grpc_are_traced(collector: Collector) -> None:
    asked: list[str] = []

    async def first_stalls(message: bytes, context: Any) -> bytes:
        sent = context.invocation_metadata()
        asked.extend(value for name, value in sent if name == "traceparent")
        assert [value for name, value in sent if name == "tracestate"] == [STATE]
        if len(asked) == 1:
            await asyncio.sleep(3600)
        return await grpc_echo(message, context)

    async with GrpcUpstream() as one, GrpcUpstream() as other:
        one.answer = other.answer = first_stalls
        options: dict[str, Any] = {"hedge_delay_ms": "5:20", "cancel": "close"}
        async with grpc_gateway(one, other, **options) as channel:
            assert await channel.unary_unary(ECHO)(b"x", metadata=tuple(SENT.items())) == b"x"
    (request,), attempts = collector.split()
    assert (request.trace, request.parent) == (TRACE, PARENT)
    about = {"rpc.system": "grpc", "rpc.service": "some.Service", "rpc.method": "Echo"}
    done = {**about, "rpc.grpc.status_code": 0}
    assert request.attributes == {**done, "codedinvnet.outcome": "direct"}
    assert sorted(asked) == sorted(below(request, attempts))
    won = next(s.attributes for s in attempts if s.attributes["codedinvnet.outcome"] == "won")
    assert won.items() >= {**done, "codedinvnet.attempt": "hedge"}.items()


@pytest.mark.parametrize(
    ("variables", "flags"),
    [
        ({ENDPOINT: ""}, None),
        ({"OTEL_SDK_DISABLED": "true"}, None),
        ({"OTEL_TRACES_EXPORTER": "none"}, None),
        ({ENDPOINT: "collector:4318"}, None),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, None),
        ({"OTEL_TRACES_SAMPLER": "always_off"}, "00"),
    ],
)
async def test_what_upstreams_are_told_if_no_span_is_sent(
    collector: Collector,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    variables: dict[str, str],
    flags: str | None,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    caplog.set_level(logging.WARNING)
    async with gateway(Upstream()) as g:
        await g.ask("GET", "/", None, **SENT)
        fields = g.upstreams[0].requests[0].fields
    if flags is None:
        assert fields.items() >= SENT.items()
    else:
        assert fields["traceparent"].startswith(f"00-{TRACE}-")
        assert fields["traceparent"].endswith(f"-{flags}")
        assert PARENT not in fields["traceparent"]
    assert not collector.requests
    (name, value), *_ = variables.items()
    is_wrong = value in ("grpc", "collector:4318")
    reasons = [getattr(r, "fields", {}) for r in caplog.records if r.msg == "traces are off"]
    assert [name in each["reason"] for each in reasons] == [True] * is_wrong


async def test_a_collector_that_hangs_delays_nobody() -> None:
    async with Collector(hangs=True) as collector, Upstream() as upstream:
        env = {
            ENDPOINT: collector.url,
            "OTEL_EXPORTER_OTLP_TIMEOUT": "600",
            "OTEL_BSP_SCHEDULE_DELAY": "20",
        }
        async with process(upstream, env=env) as one:
            await one.client.ask("GET", "/", 5.0)
            await until(lambda: bool(collector.requests))
            for _ in range(50):
                assert (await one.client.ask("GET", "/", 5.0)).status == 200
            one.process.terminate()
            await one.end()


@pytest.mark.parametrize("is_traced", [True, False])
async def test_the_logs_name_the_trace(is_traced: bool) -> None:
    async with Collector() as collector, Upstream(saying(b"", 500)) as upstream:
        env = {ENDPOINT: collector.url if is_traced else ""}
        async with process(upstream, "--access-log", "json", env=env) as one:
            assert (await one.client.ask("GET", "/", 5.0, None, [*SENT.items()])).status == 500
            assert (await one.event("request failed"))["trace_id"] == TRACE
            one.process.terminate()
            assert one.process.stdout is not None
            assert json.loads(await one.process.stdout.read())["trace_id"] == TRACE
            await one.end()
    assert bool(collector.spans) is is_traced

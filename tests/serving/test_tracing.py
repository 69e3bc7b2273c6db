"""Traces: what the SDK's exporter gets, and what upstreams see of them."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.http.aio as triton
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from codedinvnet.errors import UserError
from codedinvnet.serving import tracing
from codedinvnet.serving.options import ServeOptions
from codedinvnet.serving.serve import running
from tests.observing import until
from tests.protect.conftest import PLACE
from tests.serving.gateway.asking import ask, ask_grpc, request
from tests.serving.gateway.fakes import Fake, GrpcFake, gateway
from tests.serving.gateway.servers import Server, asked, queries, scores

COLLECTOR = "http://127.0.0.1:4318"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    found = InMemorySpanExporter()
    monkeypatch.setattr(tracing, "exporter_to", lambda _: found)
    return found


@asynccontextmanager
async def traced(*fakes: Fake | GrpcFake, **options: Any) -> AsyncIterator[tuple[str, int | None]]:
    async with gateway(*fakes, traces=COLLECTOR, **options) as (address, _, port):
        yield address, port


def identity(span: ReadableSpan) -> tuple[str, str]:
    context = span.get_span_context()
    assert context is not None
    return f"{context.trace_id:032x}", f"{context.span_id:016x}"


def above(span: ReadableSpan) -> str:
    return "" if span.parent is None else f"{span.parent.span_id:016x}"


def linked(span: ReadableSpan) -> list[str]:
    return [f"{link.context.span_id:016x}" for link in span.links]


def split(exporter: InMemorySpanExporter) -> tuple[list[ReadableSpan], list[ReadableSpan]]:
    """Return the spans of requests and those of attempts, each in the order of their beginnings."""
    spans = sorted(exporter.get_finished_spans(), key=lambda span: span.start_time or 0)
    requests = [span for span in spans if span.kind is SpanKind.SERVER]
    return requests, [span for span in spans if span.kind is SpanKind.CLIENT]


def attributes(span: ReadableSpan, *names: str) -> list[Any]:
    return [(span.attributes or {}).get(name) for name in names]


def names(spans: Sequence[ReadableSpan]) -> list[str]:
    return [span.name for span in spans]


@pytest.mark.parametrize("kind", [Fake, GrpcFake])
@pytest.mark.parametrize("over", ["http", "grpc"])
async def test_a_trace_goes_through(
    kind: type[Fake | GrpcFake], over: str, exporter: InMemorySpanExporter
) -> None:
    fake = kind()

    async with traced(fake, grpc_port=0) as (address, port):
        headers: Any = {"traceparent": TRACEPARENT, "tracestate": "a=b", "baggage": "c=d"}
        if over == "http":
            await ask(address, **headers)
        else:
            await ask_grpc(port, request(bytes(12)), **headers)
    (whole,), (attempt,) = split(exporter)
    assert (identity(whole)[0], above(whole)) == (TRACE, PARENT)
    assert (identity(attempt)[0], above(attempt)) == (TRACE, identity(whole)[1])
    assert attempt.name == "attempt"
    assert attributes(attempt, "codedinvnet.result", "codedinvnet.upstream") == ["ok", fake.url]
    status = "http.response.status_code" if over == "http" else "rpc.grpc.status_code"
    wanted = ["direct", 200 if over == "http" else 0]
    assert attributes(whole, "codedinvnet.outcome", status) == wanted
    seen = fake.seen[0][1]
    assert seen["traceparent"] == f"00-{TRACE}-{identity(attempt)[1]}-01"
    assert (seen["tracestate"], seen["baggage"]) == ("a=b", "c=d")


async def test_a_request_without_a_trace_begins_one(exporter: InMemorySpanExporter) -> None:
    fake = Fake()

    async with traced(fake) as (address, _):
        for _ in range(2):
            await ask(address)
    requests, attempts = split(exporter)
    assert len({identity(span)[0] for span in requests}) == 2
    for whole, attempt, (_, seen, _) in zip(requests, attempts, fake.seen, strict=True):
        assert above(whole) == ""
        assert seen["traceparent"].split("-")[1:3] == list(identity(attempt))


async def test_a_copy_is_linked_to_the_first_attempt(exporter: InMemorySpanExporter) -> None:
    fakes = Fake(), Fake()
    for fake in fakes:
        fake.hold()

    async with gateway(*fakes, traces=COLLECTOR, policy="replicate") as (address, relay, _):
        asking = asyncio.create_task(ask(address))
        await until(lambda: all(fake.seen for fake in fakes))
        for fake in fakes:
            fake.go()
        await asking
        await until(lambda: relay.front.times.service.seen == 2)
    (whole,), (first, copy) = split(exporter)
    assert names([first, copy]) == ["attempt", "hedge"]
    assert linked(copy) == [identity(first)[1]]
    assert above(first) == above(copy) == identity(whole)[1]
    urls = [attributes(span, "codedinvnet.upstream")[0] for span in (first, copy)]
    assert sorted(urls) == sorted(fake.url for fake in fakes)


async def test_a_copy_that_is_stopped_is_no_failure(exporter: InMemorySpanExporter) -> None:
    slow, quick = GrpcFake(), Fake()
    slow.delay = 30.0
    quick.hold()

    async with traced(slow, quick, policy="replicate", cancel=True) as (address, _):
        asking = asyncio.create_task(ask(address))
        await until(lambda: len(slow.seen) == 1)
        quick.go()
        await asking
        await until(lambda: slow.cancelled == 1)
    _, attempts = split(exporter)
    by_url = {attributes(span, "codedinvnet.upstream")[0]: span for span in attempts}
    assert attributes(by_url[slow.url], "codedinvnet.result") == ["stopped"]
    assert by_url[slow.url].status.status_code is StatusCode.UNSET


async def test_a_failure_and_what_made_up_for_it(exporter: InMemorySpanExporter) -> None:
    broken, sound = Fake(), Fake()
    broken.status = 503

    async with traced(broken, sound, policy="uncoded") as (address, _):
        for _ in range(2):
            await ask(address)
    requests, attempts = split(exporter)
    failed = next(s for s in attempts if s.status.status_code is StatusCode.ERROR)
    retry = next(s for s in attempts if s.name == "retry")
    assert attributes(failed, "codedinvnet.result", "codedinvnet.upstream") == [
        "failed",
        broken.url,
    ]
    assert attributes(retry, "codedinvnet.result", "codedinvnet.upstream") == ["ok", sound.url]
    assert linked(retry) == [identity(failed)[1]]
    assert all(span.status.status_code is StatusCode.UNSET for span in requests)


@pytest.mark.parametrize("over", ["http", "grpc"])
@pytest.mark.parametrize("mine", [True, False])
async def test_whose_fault_an_error_is(
    mine: bool, over: str, exporter: InMemorySpanExporter
) -> None:
    fake = Fake()
    fake.status = 400 if mine else 500
    async with traced(fake, grpc_port=0) as (address, port):
        if over == "http":
            await ask(address)
        else:
            with pytest.raises(grpc.aio.AioRpcError):
                await ask_grpc(port, request(bytes(12)))
    (whole,), (attempt,) = split(exporter)
    assert whole.status.status_code is (StatusCode.UNSET if mine else StatusCode.ERROR)
    assert attributes(attempt, "codedinvnet.result") == ["error" if mine else "failed"]


async def test_a_parity_is_linked_to_all_its_requests(exporter: InMemorySpanExporter) -> None:
    options = ServeOptions(
        "mnist",
        k=2,
        policy="coded",
        port=0,
        traces=COLLECTOR,
        group_timeout_ms=4000,
        deadline_ms=30_000,
    )
    async with (
        running(options) as (address, _),
        triton.InferenceServerClient(address.removeprefix("http://")) as client,
    ):
        tensor = triton.InferInput("images", [1, 1, 28, 28], "UINT8")
        tensor.set_data_from_numpy(np.zeros((1, 1, 28, 28), np.uint8))
        asked = [client.infer("mnist", [tensor]) for _ in range(2)]
        await asyncio.gather(*asked)
    requests, attempts = split(exporter)
    assert len(requests) == 2
    assert sorted(names(attempts)) == ["attempt", "attempt", "parity"]
    parity = next(span for span in attempts if span.name == "parity")
    assert {above(parity), *linked(parity)} == {identity(span)[1] for span in requests}
    assert attributes(parity, "codedinvnet.queries") == [2]
    for span in attempts:
        assert attributes(span, "codedinvnet.worker")[0] in range(3)


async def test_a_backup_that_is_an_upstream_is_part_of_the_trace(
    exporter: InMemorySpanExporter,
) -> None:
    seen: list[str] = []

    class Backup(Server):
        async def _infer(self, request: web.Request) -> web.Response:
            seen.append(request.headers.get("traceparent", ""))
            return await super()._infer(request)

    server, small = Server(), Backup(f"{PLACE}:smaller")
    await small.start()
    url = f"{small.url}/v2/models/m"
    policy = {"policy": "small-backup", "k": 2, "traces": COLLECTOR}
    async with gateway(server, backup_upstream=url, **policy) as (address, _, _):
        server.hold()
        seen.clear()  # the start asks it, too
        assert scores(await asked(address, queries(1)))[1] == "decoded"
        server.go()
    await small.stop()
    (whole,), attempts = split(exporter)
    assert attributes(whole, "codedinvnet.outcome") == ["decoded"]
    (parity,) = (span for span in attempts if span.name == "parity")
    assert above(parity) == identity(whole)[1]
    (told,) = seen
    assert told.split("-")[1:3] == list(identity(parity))


async def test_a_real_collector_and_one_that_is_not_there() -> None:
    got: list[ExportTraceServiceRequest] = []

    async def take(request: web.Request) -> web.Response:
        got.append(ExportTraceServiceRequest.FromString(await request.read()))
        return web.Response()

    app = web.Application()
    app.router.add_post("/v1/traces", take)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    assert site._server is not None
    port = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
    async with gateway(Fake(), traces=f"http://127.0.0.1:{port}") as (address, _, _):
        await ask(address)
    await runner.cleanup()
    async with gateway(Fake(), traces=f"http://127.0.0.1:{port}") as (address, _, _):
        assert (await ask(address)).status == 200
        began = time.monotonic()
    assert time.monotonic() - began < 5
    (resource,) = got[0].resource_spans
    told = {a.key: a.value.string_value for a in resource.resource.attributes}
    assert told["service.name"] == "codedinvnet"
    assert [span.name for span in resource.scope_spans[0].spans] == ["attempt", "POST infer"]


@pytest.mark.parametrize("url", ["collector:4318", "grpc://collector:4317", "http://"])
async def test_a_collector_that_cannot_be(url: str) -> None:
    with pytest.raises(UserError, match="--traces"):
        await export_nothing(url)


async def test_without_the_extra_a_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(UserError, match=r"codedinvnet\[otel\]"):
        await export_nothing(COLLECTOR)


async def export_nothing(url: str) -> None:
    async with tracing.exporting(url):
        raise AssertionError


def test_without_traces_nothing_of_opentelemetry_is_imported() -> None:
    code = (
        "import sys, codedinvnet.serving.faces.traced, codedinvnet.serving.tracing\n"
        "print(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

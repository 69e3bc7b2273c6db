"""Traces of a served model: a span for each request, and below it one for each attempt."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import Any

import aiohttp
import numpy as np
import pytest
import tritonclient.http.aio as triton
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from codedinvnet.common.errors import UserError
from codedinvnet.serving import tracing
from codedinvnet.serving.app import running
from codedinvnet.serving.config import ServeOptions
from tests.models.factories import PLACE

COLLECTOR = "http://127.0.0.1:4318"
OWN: dict[str, Any] = {"source": f"{PLACE}:mlp", "pool": "examples/my_pool.py:Pool", "port": 0}


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    found = InMemorySpanExporter()
    monkeypatch.setattr(tracing, "exporter_to", lambda _: found)
    return found


def identity(span: ReadableSpan) -> str:
    context = span.get_span_context()
    assert context is not None
    return f"{context.span_id:016x}"


def above(span: ReadableSpan) -> str:
    return "" if span.parent is None else f"{span.parent.span_id:016x}"


def split(exporter: InMemorySpanExporter) -> tuple[list[ReadableSpan], list[ReadableSpan]]:
    """Return the spans of requests and those of attempts."""
    spans = exporter.get_finished_spans()
    requests = [span for span in spans if span.kind is SpanKind.SERVER]
    return requests, [span for span in spans if span.kind is SpanKind.CLIENT]


async def test_a_request_is_part_of_its_clients_trace(exporter: InMemorySpanExporter) -> None:
    trace, parent = "1" * 32, "2" * 16
    headers = {"traceparent": f"00-{trace}-{parent}-01"}
    rows = [[0.0] * 16] * 2
    entry = {"name": "input", "shape": [2, 16], "datatype": "FP32", "data": rows}
    options = ServeOptions(**OWN, workers=2, policy="uncoded", traces=COLLECTOR)
    async with running(options) as (url, _), aiohttp.ClientSession() as session:
        for body, status in (({"inputs": [entry]}, 200), ({"inputs": []}, 400)):
            address = f"{url}/v2/models/mlp/infer"
            async with session.post(address, json=body, headers=headers) as reply:
                assert reply.status == status
    (good, bad), attempts = split(exporter)
    assert {above(good), above(bad)} == {parent}
    context = good.get_span_context()
    assert context is not None
    assert f"{context.trace_id:032x}" == trace
    assert [span.name for span in attempts] == ["attempt"] * 2
    assert {above(span) for span in attempts} == {identity(good)}
    seen = dict(good.attributes or {})
    assert (seen["http.response.status_code"], seen["codedinvnet.outcome.direct"]) == (200, 2)
    assert dict(bad.attributes or {})["http.response.status_code"] == 400
    assert bad.status.status_code is StatusCode.UNSET  # the client's mistake


async def test_a_parity_is_linked_to_all_its_requests(exporter: InMemorySpanExporter) -> None:
    times: dict[str, Any] = {"group_timeout_ms": 4000, "deadline_ms": 30_000}
    options = ServeOptions(source="mnist", k=2, policy="coded", port=0, traces=COLLECTOR, **times)
    async with (
        running(options) as (address, _),
        triton.InferenceServerClient(address.removeprefix("http://")) as client,
    ):
        tensor = triton.InferInput("images", [1, 1, 28, 28], "UINT8")
        tensor.set_data_from_numpy(np.zeros((1, 1, 28, 28), np.uint8))
        await asyncio.gather(*[client.infer("mnist", [tensor]) for _ in range(2)])
    requests, attempts = split(exporter)
    assert sorted(span.name for span in attempts) == ["attempt", "attempt", "parity"]
    parity = next(span for span in attempts if span.name == "parity")
    linked = [f"{link.context.span_id:016x}" for link in parity.links]
    assert {above(parity), *linked} == {identity(span) for span in requests}


@pytest.mark.parametrize("url", ["collector:4318", "grpc://collector:4317", "http://"])
async def test_a_collector_that_cannot_be(url: str) -> None:
    with pytest.raises(UserError, match="traces"):
        async with tracing.exporting(url):
            raise AssertionError


def test_without_traces_nothing_of_opentelemetry_is_imported() -> None:
    code = (
        "import sys, codedinvnet.serving.app\n"
        "print(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

"""Traces of a served model: a span for each request, and below it one for each attempt."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import numpy as np
import pytest
import tritonclient.http.aio as triton

from codedinvnet.serving.app import running
from codedinvnet.serving.config import ServeOptions
from tests.collector import Collector
from tests.models.factories import PLACE

OWN: dict[str, Any] = {"source": f"{PLACE}:mlp", "pool": "examples/my_pool.py:Pool", "port": 0}


@pytest.fixture
async def collector(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Collector]:
    async with Collector() as found:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", found.url)
        yield found


async def test_a_request_is_part_of_its_clients_trace(collector: Collector) -> None:
    trace, parent = "1" * 32, "2" * 16
    headers = {"traceparent": f"00-{trace}-{parent}-01"}
    rows = [[0.0] * 16] * 2
    entry = {"name": "input", "shape": [2, 16], "datatype": "FP32", "data": rows}
    options = ServeOptions(**OWN, workers=2, policy="uncoded")
    async with running(options) as (url, _), aiohttp.ClientSession() as session:
        for body, status in (({"inputs": [entry]}, 200), ({"inputs": []}, 400)):
            address = f"{url}/v2/models/mlp/infer"
            async with session.post(address, json=body, headers=headers) as reply:
                assert reply.status == status
    (good, bad), attempts = collector.split()
    assert {(span.trace, span.parent) for span in (good, bad)} == {(trace, parent)}
    assert [span.name for span in attempts] == ["attempt"] * 2
    assert {span.parent for span in attempts} == {good.id}
    seen = good.attributes
    assert (seen["http.response.status_code"], seen["codedinvnet.outcome.direct"]) == (200, 2)
    assert bad.attributes["http.response.status_code"] == 400
    assert not bad.has_failed  # the client's mistake


async def test_a_parity_is_linked_to_all_its_requests(collector: Collector) -> None:
    times: dict[str, Any] = {"group_timeout_ms": 4000, "deadline_ms": 30_000}
    options = ServeOptions(source="mnist", k=2, policy="coded", port=0, **times)
    async with (
        running(options) as (address, _),
        triton.InferenceServerClient(address.removeprefix("http://")) as client,
    ):
        tensor = triton.InferInput("images", [1, 1, 28, 28], "UINT8")
        tensor.set_data_from_numpy(np.zeros((1, 1, 28, 28), np.uint8))
        await asyncio.gather(*[client.infer("mnist", [tensor]) for _ in range(2)])
    requests, attempts = collector.split()
    assert sorted(span.name for span in attempts) == ["attempt", "attempt", "parity"]
    parity = next(span for span in attempts if span.name == "parity")
    assert {parity.parent, *parity.links} == {span.id for span in requests}


def test_without_traces_nothing_of_opentelemetry_is_imported() -> None:
    code = (
        "import sys, codedinvnet.serving.app, codedinvnet.gateway.run\n"
        "print(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

"""A service on a port of its own, over workers that are threads of this process."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import httpx
import numpy as np

from codedinvnet.codes.build import scheme_for
from codedinvnet.models.bundle import Bundle
from codedinvnet.net.guard import Guard
from codedinvnet.net.listening import bind
from codedinvnet.net.server import HttpServer
from codedinvnet.scheduler.policies import POLICIES
from codedinvnet.scheduler.settings import Rules
from codedinvnet.serving.api.bodies import BodyMemory
from codedinvnet.serving.api.http import HttpApi
from codedinvnet.serving.api.page import DEMO_HEADER, demo_requests, page_routes
from codedinvnet.serving.choices import Choices
from codedinvnet.serving.service import InferenceService
from codedinvnet.serving.workers.faults import FaultyPool, Schedule
from tests.serving.bundles import BundleFront, BundlePool
from tests.serving.stub import token_of

K, WORKERS = 4, 6
INFER = "/v2/models/mnist/infer"
MAX_BODY = 100_000
TOKEN = "an open secret"


class Service:
    """A front end with its app, and a client of it."""

    def __init__(
        self,
        front: BundleFront,
        pool: BundlePool,
        memory: BodyMemory,
        client: httpx.AsyncClient,
        started: asyncio.Task[None],
    ) -> None:
        self.front, self.pool, self.memory = front, pool, memory
        self.client, self.started = client, started
        self.raw: list[RawClient] = []

    async def infer(self, images: np.ndarray, **more: Any) -> httpx.Response:
        """Send JSON; `more` replaces what stands in the request."""
        return await self.client.post(INFER, json={"inputs": [tensor(images)], **more})

    async def connect(self, data: bytes) -> RawClient:
        """Return a client that has sent some bytes."""
        streams = await asyncio.open_connection("127.0.0.1", self.client.base_url.port)
        self.raw.append(RawClient(*streams, data))
        return self.raw[-1]

    def count(self, status: int) -> float:
        """Return how many requests for inference had a status."""
        counted = self.front.metrics.registry.get_sample_value
        return counted("codedinvnet_requests_total", {"code": str(status)}) or 0.0

    def hang_all(self) -> None:
        for worker in range(WORKERS):
            self.pool.hang(worker)

    def kill_all(self) -> None:
        for worker in range(WORKERS):
            self.pool.kill(worker)


class RawClient:
    """A client that decides on every byte, and may leave."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes
    ) -> None:
        self.reader, self.writer = reader, writer
        writer.write(data)

    async def answer(self) -> bytes:
        """Return the head of the answer."""
        return await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 30)

    def leave(self) -> None:
        self.writer.transport.abort()


def post(body: bytes, length: int | None = None, *fields: str) -> bytes:
    """Return a request for inference, the body of which may be shorter than it says."""
    size = len(body) if length is None else length
    lines = [f"POST {INFER} HTTP/1.1", "Host: localhost", f"Content-Length: {size}", *fields]
    return "\r\n".join([*lines, "", ""]).encode() + body


def asked(images: np.ndarray) -> bytes:
    """Return a request for inference on images."""
    return post(json.dumps({"inputs": [tensor(images)]}).encode())


def tensor(images: np.ndarray, **more: Any) -> dict[str, Any]:
    return {
        "name": "images",
        "shape": list(images.shape),
        "datatype": "UINT8",
        "data": images.ravel().tolist(),
        **more,
    }


@asynccontextmanager
async def serving(
    bundle: Bundle,
    *,
    token: str = "",
    demo: np.ndarray | None = None,
    policy: str = "coded",
    deadline: float = 60.0,
    max_pending: int = 100,
    max_body: int = MAX_BODY,
    body_memory: int = 8 * MAX_BODY,
    classes: tuple[str, ...] | None = None,
    hosts: tuple[str, ...] = (),
    pool_class: type[BundlePool] = BundlePool,
    wait: bool = True,
    guarded: bool = True,
) -> AsyncIterator[Service]:
    method = scheme_for(bundle, K)
    pool = pool_class(method)
    front = BundleFront(
        method,
        FaultyPool(pool, Schedule()),
        Rules(WORKERS, POLICIES[policy], hang_timeout=60.0, max_pending=max_pending),
        classes or bundle.info.classes,
        deadline=deadline,
    )
    requests = None if demo is None else demo_requests(front.served, demo)
    answering = InferenceService(front, front.served, 32, max_body)
    memory = BodyMemory(body_memory, front)
    guard = Guard(hosts, token_of(token), guarded)
    routes = page_routes(answering, requests)
    api = HttpApi(answering, memory, Choices(method, WORKERS), guard, routes)
    server = HttpServer(api, memory, 100, deadline)
    started = asyncio.create_task(front.start())
    if wait:
        await started
    url = await server.listen(bind("127.0.0.1", 0), None)
    async with httpx.AsyncClient(
        base_url=url, headers={DEMO_HEADER: "1"}, timeout=60, trust_env=False
    ) as client:
        service = Service(front, pool, memory, client, started)
        try:
            yield service
        finally:
            await started
            for raw in service.raw:
                raw.leave()
            for worker in range(WORKERS):
                if pool.hung[worker].is_set():
                    pool.kill(worker)
            await server.stop(0.1)
            await front.stop()


def error(response: httpx.Response, status: int) -> str:
    """Return the message of an error response."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert list(response.json()) == ["error"]
    message: str = response.json()["error"]
    return message


async def largest_gap(service: Service, work: list[Coroutine[Any, Any, Any]]) -> float:
    """Do some work; return the longest that this process kept a health check waiting meanwhile.

    It is processor time: what other processes take of a busy machine is not the service's.
    """
    working, gaps = asyncio.gather(*work), [0.0]
    while not working.done():
        began = time.process_time()
        assert (await service.client.get("/v2/health/live")).status_code == 200
        await asyncio.sleep(0.005)
        gaps.append(time.process_time() - began)
    await working
    return max(gaps)

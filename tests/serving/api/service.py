"""A service over HTTP without a socket, for the tests."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import httpx
import numpy as np
import torch

from codedinvnet.codes.build import scheme_for
from codedinvnet.models.bundle import Bundle
from codedinvnet.scheduler.policies import POLICIES
from codedinvnet.scheduler.settings import Rules
from codedinvnet.serving.api.bodies import BodyMemory
from codedinvnet.serving.api.http import ApiOptions, HttpApi
from codedinvnet.serving.api.page import DEMO_HEADER, demo_requests, page_routes
from codedinvnet.serving.choices import Choices
from codedinvnet.serving.service import InferenceService
from codedinvnet.serving.workers.faults import FaultyPool, Schedule
from tests.serving.bundles import BundleFront, BundlePool

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
        client: httpx.AsyncClient,
        started: asyncio.Task[None],
    ) -> None:
        self.front, self.pool, self.client, self.started = front, pool, client, started

    async def infer(self, images: np.ndarray, **more: Any) -> httpx.Response:
        """Send JSON; `more` replaces what stands in the request."""
        return await self.client.post(INFER, json={"inputs": [tensor(images)], **more})

    def hang_all(self) -> None:
        for worker in range(WORKERS):
            self.pool.hang(worker)

    def kill_all(self) -> None:
        for worker in range(WORKERS):
            self.pool.kill(worker)


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
    api = HttpApi(
        answering,
        BodyMemory(body_memory, front),
        Choices(method, WORKERS),
        ApiOptions(token, hosts, guarded, requests),
        page_routes(answering, requests),
        starts=False,
    )
    started = asyncio.create_task(front.start())
    if wait:
        await started
    transport = httpx.ASGITransport(api, raise_app_exceptions=False)
    headers = {DEMO_HEADER: "1"}
    async with httpx.AsyncClient(
        transport=transport, base_url="http://localhost", headers=headers
    ) as client:
        try:
            yield Service(front, pool, client, started)
        finally:
            await started
            for worker in range(WORKERS):
                if pool.hung[worker].is_set():
                    pool.kill(worker)
            await front.stop()


def error(response: httpx.Response, status: int) -> str:
    """Return the message of an error response."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert list(response.json()) == ["error"]
    message: str = response.json()["error"]
    return message


def expected(bundle: Bundle, images: np.ndarray) -> np.ndarray:
    return bundle.classify(bundle.embed(torch.from_numpy(images))).numpy()


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


def scope(*headers: tuple[bytes, bytes]) -> dict[str, Any]:
    """Return what a server says of a request."""
    return {
        "type": "http", "method": "POST", "path": INFER, "raw_path": INFER.encode(),
        "query_string": b"", "headers": list(headers), "http_version": "1.1",
        "scheme": "http", "server": ("test", 80), "client": ("test", 1), "root_path": "",
    }  # fmt: skip


class Leaving:
    """A client that sends a request, and goes away when it is told to."""

    def __init__(self, service: Service, images: np.ndarray) -> None:
        self.service = service
        self.body = json.dumps({"inputs": [tensor(images)]}).encode()
        self.away = asyncio.Event()
        self.sent: list[Any] = []
        self.watched = False
        self._asked = 0

    async def receive(self) -> dict[str, Any]:
        self._asked += 1
        if self._asked <= 2:  # a server may say again that the body is over
            body = self.body if self._asked == 1 else b""
            return {"type": "http.request", "body": body, "more_body": False}
        self.watched = True
        try:
            await self.away.wait()
        finally:
            self.watched = False
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    async def infer(self) -> None:
        transport = self.service.client._transport
        assert isinstance(transport, httpx.ASGITransport)
        await transport.app(scope(), self.receive, self.send)

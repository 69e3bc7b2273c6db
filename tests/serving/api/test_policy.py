"""Another policy for a running service: over HTTP."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np

from codedinvnet.codes.base import Scheme
from codedinvnet.models.bundle import Bundle
from codedinvnet.serving.workers.pool import Result, Task
from tests.serving.api.service import Service, error, serving
from tests.serving.bundles import BundlePool


async def change(service: Service, policy: Any, **headers: str) -> Any:
    return await service.client.post("/policy", json={"policy": policy}, headers=headers)


class FirstTaskHangs(BundlePool):
    """Whichever worker gets the first task hangs at it; the second task waits to be let go."""

    def __init__(self, scheme: Scheme) -> None:
        super().__init__(scheme)
        self.let_go = asyncio.Event()

    async def _work(self, worker: int, task: Task) -> Result:
        if (worker, task.number) == self.calls[0]:
            self.hang(worker)
        elif (worker, task.number) == self.calls[1]:
            await self.let_go.wait()
        return await super()._work(worker, task)


async def test_queries_under_way_are_answered(mnist: Bundle, images: np.ndarray) -> None:
    """The first two are of an open group, one of them on a worker that hangs."""

    async with serving(mnist, pool_class=FirstTaskHangs) as service:
        shown = (await service.client.get("/policy")).json()
        assert shown["policy"] == "coded"
        assert set(shown["offered"]) >= {"uncoded", "replicate", "hedge", "coded", "coded+hedge"}
        waiting = asyncio.create_task(service.infer(images[:2]))
        while len(service.pool.calls) < 2:
            await asyncio.sleep(0.005)
        reply = await change(service, "uncoded")
        assert (reply.status_code, reply.json()["policy"]) == (200, "uncoded")
        assert isinstance(service.pool, FirstTaskHangs)
        service.pool.let_go.set()
        outputs = {o["name"]: o["data"] for o in (await waiting).json()["outputs"]}
        assert sorted(outputs["outcome"]) == ["decoded", "direct"]
        later = await service.infer(images[2:4])
        assert later.json()["outputs"][-1]["data"] == ["direct", "direct"]
        assert (await service.client.get("/page/state")).json()["policy"] == "uncoded"
        metrics = (await service.client.get("/metrics")).text
        assert 'codedinvnet_policy{policy="uncoded"} 1.0' in metrics
        assert 'codedinvnet_policy{policy="coded"} 0.0' in metrics
        assert 'codedinvnet_tasks_total{task="parity"} 1.0' in metrics
        assert 'codedinvnet_tasks_total{task="data"} 4.0' in metrics


async def test_what_is_refused(mnist: Bundle) -> None:
    async with serving(mnist) as service:
        client = service.client
        assert "'quick'" in error(await change(service, "quick"), 400)
        for wrong in (7, None, ["hedge"]):
            error(await change(service, wrong), 400)
        kind = {"Content-Type": "application/json"}
        error(await client.post("/policy", content=b"{", headers=kind), 400)
        error(await client.post("/policy", content=b"[]", headers=kind), 400)
        error(await client.post("/policy", content=b" " * 5000, headers=kind), 413)
        text = {"Content-Type": "text/plain"}  # as a form of another site's page sends it
        error(await client.post("/policy", content=b'{"policy": "hedge"}', headers=text), 415)
        assert (await client.get("/policy")).json()["policy"] == "coded"


async def test_it_cannot_be_changed_by_whoever_reaches_the_port(mnist: Bundle) -> None:
    async with serving(mnist, guarded=False) as service:
        assert "--token-file" in error(await change(service, "hedge"), 403)
        assert (await service.client.get("/policy")).json()["policy"] == "coded"

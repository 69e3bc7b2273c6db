"""What a service tells of itself: health, metadata, metrics, the page and its deeds."""

from __future__ import annotations

import asyncio
import base64
import os
import re
import signal
import threading

import numpy as np
import pytest

from codedinvnet.models.bundle import Bundle
from codedinvnet.serving.faces.page import DEMO_HEADER
from codedinvnet.serving.workers.faults import FaultyPool
from codedinvnet.serving.workers.pool import WorkerDied
from tests.serving.bundles import BundlePool
from tests.serving.faces.service import (
    INFER,
    WORKERS,
    K,
    error,
    serving,
    tensor,
)


class TestViews:
    async def test_health(self, mnist: Bundle) -> None:
        async with serving(mnist) as service:
            get = service.client.get
            assert (await get("/v2/health/live")).json() == {"live": True}
            assert (await get("/v2/health/ready")).json() == {"ready": True}
            for path in ("/v2/models/mnist/ready", "/v2/models/mnist/versions/1/ready"):
                response = await get(path)
                assert response.status_code == 200
                assert response.json() == {"name": "mnist", "ready": True}
            for worker in range(WORKERS):
                service.front.scheduler.worker_lost(0.0, worker, "gone")
            assert (await get("/v2/health/ready")).status_code == 503

    async def test_without_workers_it_is_dead_after_a_time(
        self, mnist: Bundle, images: np.ndarray
    ) -> None:
        class Lost(BundlePool):
            async def replace(self, worker: int) -> None:
                raise WorkerDied("no node is left")

        async with serving(mnist, pool_class=Lost) as service:
            get = service.client.get
            for worker in range(WORKERS):
                service.pool.kill(worker)
            while service.front.ready:
                await asyncio.sleep(0.01)
            assert error(await service.infer(images[:1]), 503) == "no worker is up: try again later"
            assert (await get("/v2/health/live")).status_code == 200
            service.front.supervisor.down_timeout = 0.0
            response = await get("/v2/health/live")
            assert response.status_code == 503
            assert response.json() == {"live": False}

    async def test_while_it_starts(self, mnist: Bundle, images: np.ndarray) -> None:
        go = asyncio.Event()

        class Slow(BundlePool):
            async def start(self, size: int) -> None:
                await go.wait()
                await super().start(size)

            def pid(self, worker: int) -> int | None:
                assert go.is_set(), "there is no process yet"
                return None

        async with serving(mnist, demo=images[:1], pool_class=Slow, wait=False) as service:
            get = service.client.get
            try:
                assert (await get("/v2/health/live")).status_code == 200
                for path in ("/v2/health/ready", "/v2/models/mnist/ready"):
                    assert (await get(path)).status_code == 503
                response = await service.infer(images[:1])
                assert error(response, 503) == "starting: try again later"
                assert int(response.headers["retry-after"]) >= 1
                workers = (await get("/page/state")).json()["workers"]
                assert [worker["state"] for worker in workers] == ["starting"] * WORKERS
                metrics = (await get("/metrics")).text
                assert f'codedinvnet_workers{{state="starting"}} {WORKERS:.1f}' in metrics
                deed = await service.client.post("/demo/workers/0/kill")
                assert error(deed, 503) == "worker 0 is starting"
            finally:
                go.set()
            await service.started
            assert (await get("/v2/health/ready")).status_code == 200
            assert (await service.infer(images[:1])).status_code == 200
            workers = (await get("/page/state")).json()["workers"]
            assert {worker["state"] for worker in workers} == {"up"}

    async def test_metadata(self, mnist: Bundle) -> None:
        async with serving(mnist) as service:
            reply = (await service.client.get("/v2")).json()
            assert reply["name"] == "codedinvnet"
            assert reply["extensions"] == ["binary_tensor_data"]
            assert re.fullmatch(r"\d+\.\d+\.\d+.*", reply["version"])
            model = (await service.client.get("/v2/models/mnist")).json()
            assert model == (await service.client.get("/v2/models/mnist/versions/1")).json()
            assert model["name"] == "mnist"
            assert model["versions"] == ["1"]
            assert model["inputs"][0]["shape"] == [-1, 1, 28, 28]
            names = [output["name"] for output in model["outputs"]]
            assert names == ["probabilities", "label", "outcome"]

    async def test_figures_are_written_while_others_are_answered(
        self, mnist: Bundle, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Those of 200 upstreams take a tenth of a second; two who ask are served in turn."""
        begun: list[str] = []
        go_on = threading.Event()

        def slowly() -> bytes:
            begun.append("text")
            assert go_on.wait(10)
            return b"text"

        async with serving(mnist) as service:
            get = service.client.get
            monkeypatch.setattr(service.front.metrics, "render", slowly)
            asked = [asyncio.create_task(get("/metrics")) for _ in range(2)]
            while not begun:
                await asyncio.sleep(0.01)
            assert (await get("/v2/health/live")).status_code == 200
            assert len(begun) == 1
            go_on.set()
            assert [(await task).text for task in asked] == ["text", "text"]

    async def test_metrics(self, mnist: Bundle, images: np.ndarray) -> None:
        async with serving(mnist) as service:
            service.pool.hang(2)
            await service.infer(images[:K])
            response = await service.client.get("/metrics")
            assert response.headers["content-type"].startswith("text/plain")
            lines = response.text.splitlines()
            values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
            assert values['codedinvnet_queries_total{outcome="direct"}'] == "3.0"
            assert values['codedinvnet_queries_total{outcome="decoded"}'] == "1.0"
            assert values['codedinvnet_workers{state="up"}'] == str(float(WORKERS))
            assert values["codedinvnet_pending_queries"] == "0.0"
            assert values['codedinvnet_requests_total{code="200"}'] == "1.0"
            assert values[f'codedinvnet_task_failures_total{{worker="{WORKERS - 1}"}}'] == "0.0"
            assert values[f'codedinvnet_groups_total{{size="{K - 1}"}}'] == "0.0"
            assert all(name.startswith(("codedinvnet_", "process_")) for name in values)
            described = {line.split()[2] for line in lines if line.startswith("# HELP")}
            assert described >= {
                "codedinvnet_queries_total",
                "codedinvnet_query_latency_seconds",
                "codedinvnet_decode_seconds",
                "codedinvnet_worker_seconds",
                "codedinvnet_queue_depth",
                "codedinvnet_worker_restarts_total",
                "codedinvnet_groups_total",
                "codedinvnet_live_recovered_agreement",
                "codedinvnet_parity_residual",
                "codedinvnet_event_loop_lag_seconds",
            }

    async def test_page(self, mnist: Bundle, images: np.ndarray) -> None:
        async with serving(mnist) as service:
            response = await service.client.get("/")
            assert response.headers["content-type"].startswith("text/html")
            assert re.findall(r"(?:https?:)?//[\w.-]+\.\w+", response.text) == []
            assert re.findall(r"\b(?:src|href)=\"(?!data:)", response.text) == []

            service.pool.hang(2)
            await service.infer(images[:K])
            state = (await service.client.get("/page/state")).json()
            assert state["answers"]["direct"] == 3
            assert state["answers"]["decoded"] == 1
            assert state["demo"] is False
            assert state["k"] == K
            assert len(state["workers"]) == WORKERS
            assert {worker["pid"] for worker in state["workers"]} == {None}
            (group,) = state["groups"]
            outcomes = [member["outcome"] for member in group["members"]]
            assert outcomes == ["direct", "direct", "decoded", "direct"]
            assert base64.b64decode(group["members"][0]["image"]) == images[0].tobytes()
            assert set(state["percentiles"]) == {"direct", "decoded"}
            await asyncio.sleep(0.4)
            state = (await service.client.get("/page/state")).json()
            assert [w["state"] for w in state["workers"]].index("silent") == 2

    async def test_the_page_shows_float_images(self, mnist: Bundle, images: np.ndarray) -> None:
        async with serving(mnist) as service:
            floats = (images[:K] / 255).astype(np.float32)
            inputs = [tensor(floats, datatype="FP32")]
            await service.client.post(INFER, json={"inputs": inputs})
            (group,) = (await service.client.get("/page/state")).json()["groups"]
            assert base64.b64decode(group["members"][1]["image"]) == images[1].tobytes()


class Numbered(BundlePool):
    """Claims that its workers are processes."""

    def pid(self, worker: int) -> int | None:
        return 1_000_000_000 + worker


@pytest.fixture
def signals(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Return what `os.kill` was asked for, in place of which nothing is done."""
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    return sent


class TestDemo:
    async def test_images(self, mnist: Bundle, images: np.ndarray) -> None:
        async with serving(mnist, demo=images) as service:
            found = (await service.client.get("/demo/requests")).json()
            data = [request["inputs"][0]["data"] for request in found]
            assert [base64.b64decode(text) for text in data] == [i.tobytes() for i in images]
            assert (await service.client.get("/page/state")).json()["demo"] is True

    async def test_deeds(
        self, mnist: Bundle, images: np.ndarray, signals: list[tuple[int, int]]
    ) -> None:
        async with serving(mnist, demo=images, pool_class=Numbered) as service:
            post = service.client.post
            for deed in ("kill", "stop", "heal"):
                response = await post(f"/demo/workers/2/{deed}")
                assert response.json() == {"worker": 2, "deed": deed}
            sent = [signal.SIGKILL, signal.SIGSTOP, signal.SIGCONT]
            assert signals == [(1_000_000_002, number) for number in sent]
            for worker in (WORKERS, -1, "one"):
                message = error(await post(f"/demo/workers/{worker}/kill"), 404)
                assert message == f"no worker {worker}"
            assert "no deed 'hurt'" in error(await post("/demo/workers/0/hurt"), 404)
            assert len(signals) == 3

            await post("/demo/workers/1/slow")
            response = await service.infer(images[:K])
            assert response.json()["outputs"][2]["data"][1] == "decoded"
            await post("/demo/workers/1/heal")
            pool = service.front.pool
            assert isinstance(pool, FaultyPool)
            assert pool.faults == []

    async def test_a_page_of_another_site_hurts_nobody(
        self, mnist: Bundle, images: np.ndarray, signals: list[tuple[int, int]]
    ) -> None:
        """What a browser sends there without asking first has no header of ours."""
        async with serving(mnist, demo=images, pool_class=Numbered) as service:
            for given in (None, "", "0"):
                service.client.headers.pop(DEMO_HEADER, None)
                if given is not None:
                    service.client.headers[DEMO_HEADER] = given
                message = error(await service.client.post("/demo/workers/0/kill"), 403)
                assert message == f"the header {DEMO_HEADER}: 1 is needed"
            assert not signals
            page = (await service.client.get("/")).text
            assert f'headers: {{ "{DEMO_HEADER}": "1" }}' in page

    async def test_a_worker_of_another_machine(self, mnist: Bundle, images: np.ndarray) -> None:
        async with serving(mnist, demo=images) as service:
            post = service.client.post
            for deed in ("kill", "stop"):
                message = error(await post(f"/demo/workers/2/{deed}"), 409)
                assert message == "worker 2 runs on another machine: slow it instead"
            for deed in ("slow", "heal"):
                assert (await post(f"/demo/workers/2/{deed}")).status_code == 200

    async def test_a_worker_that_is_being_replaced(self, mnist: Bundle, images: np.ndarray) -> None:
        async with serving(mnist, demo=images) as service:
            service.front.workers[2].state = "down"
            message = error(await service.client.post("/demo/workers/2/kill"), 409)
            assert message == "worker 2 is being replaced"

    async def test_a_worker_that_is_gone(self, mnist: Bundle, images: np.ndarray) -> None:
        async with serving(mnist, demo=images, pool_class=Numbered) as service:
            # before its death is noticed
            response = await service.client.post("/demo/workers/1/kill")
            assert response.status_code == 200

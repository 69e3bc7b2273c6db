"""A gateway's small backup: what it does not answer for, and how it is asked."""

from __future__ import annotations

import asyncio
import gc
import json
import math
import threading
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from aiohttp import web

from codedinvnet.models.base import HEADER_LENGTH
from codedinvnet.serving import supervisor
from codedinvnet.serving.answers import BadRequest
from codedinvnet.serving.faces.http import LARGE_BODY
from codedinvnet.serving.gateway.backup import UpstreamBackup
from codedinvnet.serving.gateway.calls import Call
from codedinvnet.serving.gateway.guard import Backup
from codedinvnet.serving.gateway.opening import open_guard
from codedinvnet.serving.gateway.options import GatewayOptions
from codedinvnet.serving.gateway.pool import UpstreamPool
from codedinvnet.serving.gateway.run import make_relay
from codedinvnet.serving.gateway.understanding import Understanding, call_of
from codedinvnet.serving.gateway.upstream_metrics import UpstreamMetrics
from codedinvnet.serving.gateway.upstreams import open_upstream
from codedinvnet.serving.metrics import Metrics
from codedinvnet.serving.workers.pool import Task, WorkerFailed
from codedinvnet.serving.workers.result import Abandoned, Result
from tests.observing import until
from tests.protect.conftest import PLACE, finished  # noqa: F401
from tests.protect.factories import FEATURES
from tests.serving.gateway.asking import ask_grpc
from tests.serving.gateway.fakes import gateway
from tests.serving.gateway.servers import (
    MODEL,
    SMALL,
    GrpcServer,
    Server,
    asked,
    asked_in_json,
    message,
    queries,
    scores,
)
from tests.serving.gateway.test_protection import refused


class Bounded(Server):
    """Takes so many queries at once."""

    def __init__(self, most: int) -> None:
        super().__init__(f"{PLACE}:smaller")
        self.most = most
        self.sizes: list[int] = []
        self.at_once, self.most_at_once = 0, 0

    async def _infer(self, request: web.Request) -> web.Response:
        head = (await request.read())[: int(request.headers[HEADER_LENGTH])]
        self.sizes.append(json.loads(head)["inputs"][0]["shape"][0])
        if self.sizes[-1] > self.most:
            return web.json_response({"error": "the batch is too large"}, status=400)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await asyncio.sleep(self.delay)
        self.at_once -= 1
        return await super()._infer(request)


async def test_a_request_without_finite_scores_takes_nobody_elses_answer(finished: Path) -> None:  # noqa: F811
    """It waits for an upstream, and the backup goes on."""
    server, nan = Server(), np.full_like(queries(2), np.nan)
    own = {"method": "own-backup", "policy": "small-backup", "backup_workers": 2, "slots": 64}
    patient = {"group_timeout_ms": 10_000, "deadline_ms": 60_000, "hang_timeout_ms": 50_000}

    async with gateway(server, protection=finished, **own, **patient) as (address, relay, _):
        server.hold()
        odd = []
        for _ in range(6):
            odd.append(asyncio.create_task(asked(address, nan)))
            found = await asyncio.gather(*(asked(address, queries(1, i)) for i in range(3)))
            assert {scores(got)[1] for got in found} == {"decoded"}
        assert not any(each.done() for each in odd)
        assert all(view.restarts == 0 for view in relay.front.workers)
        server.go()
        assert {scores(got)[1] for got in await asyncio.gather(*odd)} == {"direct"}


@pytest.mark.parametrize(("most", "sizes"), [(8, [5, 4]), (4, [4, 4, 1]), (10, [9])])
async def test_an_upstream_as_the_backup_is_asked_for_no_more_than_it_takes(
    most: int, sizes: list[int]
) -> None:
    server, small = Server(), Bounded(most)
    await small.start()
    try:
        url = f"{small.url}/v2/models/m"
        async with gateway(server, backup_upstream=url, policy="small-backup") as (address, _, _):
            server.hold()
            before = len(small.sizes)
            answer, outcome = scores(await asked(address, queries(9)))
            assert outcome == "decoded"
            expected = small.model.run({"x": queries(9)})["output"]
            assert answer == pytest.approx(expected, abs=1e-5)
            assert sorted(small.sizes[before:], reverse=True) == sizes
            server.go()
    finally:
        await small.stop()


async def test_an_upstream_as_the_backup_is_at_no_more_questions_than_its_slots() -> None:
    """A task of many queries is several; once one fails, the rest is of no use."""
    server, small = Server(), Bounded(4)
    await small.start()
    small.delay = 0.02
    options = {"policy": "small-backup", "k": 4, "slots": 2, "deadline_ms": 60_000}
    try:
        url = f"{small.url}/v2/models/m"
        async with gateway(server, backup_upstream=url, **options) as (address, _, _):
            server.hold()
            found = await asyncio.gather(*(asked(address, queries(40, i)) for i in range(2)))
            assert {scores(got)[1] for got in found} == {"decoded"}
            assert small.most_at_once == 2
            small.delay, small.status, before = 0.0, 500, len(small.sizes)
            late = asyncio.create_task(asked(address, queries(256)))
            await until(lambda: len(small.sizes) > before)
            await asyncio.sleep(0.3)
            server.go()
            assert scores(await late)[1] == "direct"
            assert len(small.sizes) - before < 20
    finally:
        await small.stop()


async def test_what_has_had_no_slot_until_its_time_was_over_is_not_asked() -> None:
    begun = []

    class Held:
        model = "m"

        async def call(self, worker: int, task: Task) -> Result:
            begun.append(task.attempt)
            await asyncio.sleep(0.2)
            raise WorkerFailed

    pool = cast("UpstreamPool", Held())
    backup = UpstreamBackup(pool, MODEL.signature.inputs, "output", lambda found: found, 4, 1)
    x, now = {"x": queries(1)}, time.monotonic()
    calls = [backup.call(0, Task(i, 4, x, until=now + end)) for i, end in enumerate((9.0, 0.1))]
    failed, late = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(failed, WorkerFailed)
    assert isinstance(late, Abandoned)
    assert begun == [0]


async def test_questions_of_a_task_that_failed_keep_their_slots_until_they_end() -> None:
    begun, at_once = [], [0]

    class Uneven:
        model = "m"

        async def call(self, worker: int, task: Task) -> Result:
            begun.append(task.attempt)
            at_once.append(at_once[-1] + 1)
            try:
                await asyncio.sleep((0.01, 0.2, 1.0, 1.0)[len(begun) - 1])
                raise WorkerFailed
            finally:
                at_once.append(at_once[-1] - 1)

    pool = cast("UpstreamPool", Uneven())
    backup = UpstreamBackup(pool, MODEL.signature.inputs, "output", lambda found: found, 1, 2)
    until = time.monotonic() + 9.0
    for i in range(2):
        with pytest.raises(WorkerFailed):
            await backup.call(0, Task(i, 4, {"x": queries(4)}, until=until))
    assert max(at_once) == 2
    assert begun == [0, 0, 1, 1]


@pytest.mark.parametrize("refusal", [400, 500])
async def test_servers_that_take_json_alone_have_a_backup_and_are_one(refusal: int) -> None:
    """What it takes is found out once, and not with every question."""
    server, small = Server(), Server(f"{PLACE}:smaller")
    server.takes_binary = small.takes_binary = False
    server.refusal = small.refusal = refusal
    await small.start()
    try:
        url = f"{small.url}/v2/models/m"
        async with gateway(server, backup_upstream=url, policy="small-backup") as (address, _, _):
            server.hold()
            misunderstood = []
            for seed in range(3):
                x = queries(2, seed)
                answer, outcome = await asked_in_json(address, x)
                assert outcome == "decoded"
                assert answer == pytest.approx(small.model.run({"x": x})["output"], abs=1e-5)
                misunderstood.append(small.misunderstood)
            assert misunderstood[0] == misunderstood[-1]
            server.go()
    finally:
        await small.stop()


@pytest.mark.parametrize(("takes_binary", "status"), [(False, 503), (False, 401), (True, 404)])
async def test_a_question_that_is_refused_in_both_forms_ends_with_what_is_wrong(
    takes_binary: bool, status: int
) -> None:
    """A failure, or a token that is wanted, is no refusal of the question."""
    server = Server()
    server.takes_binary, server.status = takes_binary, status
    await server.start()
    upstream = open_upstream(server.url)
    try:
        x = {"x": queries(1)}
        reply = await upstream.infer(call_of("m", x, MODEL.signature.inputs, math.inf), 9.0)
        assert reply.status == status
    finally:
        await upstream.close()
        await server.stop()


async def test_one_large_request_is_read_at_a_time_though_its_client_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server, small = Server(), Server(f"{PLACE}:smaller")
    at_it, may_end = [], threading.Event()

    def read(*_: Any) -> None:
        at_it.append(threading.get_ident())
        may_end.wait(30.0)
        raise BadRequest("it does not matter")

    await small.start()
    try:
        own = {"backup_upstream": f"{small.url}/v2/models/m", "grpc_port": 0}
        async with gateway(server, **own) as (_, _, port):
            monkeypatch.setattr(Understanding, "request", read)
            large = message(queries(LARGE_BODY // FEATURES))
            leaves = asyncio.create_task(ask_grpc(port, large))
            await until(lambda: len(at_it) == 1)
            leaves.cancel()
            stays = asyncio.create_task(ask_grpc(port, large))
            await asyncio.sleep(0.2)
            assert len(at_it) == 1
            may_end.set()
            assert (await stays)[1]["codedinvnet-outcome"] == "direct"
            assert len(at_it) == 2
    finally:
        may_end.set()
        await small.stop()


async def test_no_request_stays_once_it_is_answered() -> None:
    """No page shows a gateway's requests."""
    server, small = Server(), Server(f"{PLACE}:smaller")
    await small.start()
    try:
        url = f"{small.url}/v2/models/m"
        async with gateway(server, backup_upstream=url, policy="small-backup") as (address, _, _):
            assert scores(await asked(address, queries(1), identity="it stays"))[1] == "direct"
            await until(lambda: not any(b"it stays" in call.body for call in calls()))
    finally:
        await small.stop()


async def test_an_upstream_as_the_backup_has_as_much_time_as_its_clients_wait() -> None:
    server, small = Server(), GrpcServer()
    await small.start()
    url = f"{small.url}/v2/models/m"
    options = {"policy": "small-backup", "cancel": True, "deadline_ms": 20_000}
    try:
        async with gateway(server, backup_upstream=url, **options) as (address, _, _):
            server.hold()
            small.seen.clear()
            assert scores(await asked(address, queries(1)))[1] == "decoded"
            assert max(seconds for _, _, seconds in small.seen) < 21
            server.go()
    finally:
        await small.stop()


def calls() -> list[Call]:
    """Return the requests that there are."""
    return [thing for thing in gc.get_objects() if type(thing) is Call]


@pytest.mark.parametrize("deadline_ms", [500.0, 2000.0])
@pytest.mark.parametrize("backup", ["trained", "upstream"])
async def test_a_worker_of_the_backup_is_taken_for_hung_once_nobody_waits(
    backup: str,
    deadline_ms: float,
    finished: Path,  # noqa: F811
) -> None:
    """An upstream may be busy with others, and finds that out itself."""
    server = Server()
    await server.start()
    own: dict[str, Any] = {"protection": finished, **SMALL}
    if backup == "upstream":
        own = {"backup_upstream": f"{server.url}/v2/models/m"}
    options = GatewayOptions("m", upstream=(server.url,), deadline_ms=deadline_ms, **own)
    upstreams, metrics = [open_upstream(server.url)], Metrics()
    both = metrics, UpstreamMetrics(metrics.registry)
    guard = await open_guard(options, upstreams, open_upstream, both[1])
    rules = make_relay(options, upstreams, None, guard, both).front.rules
    assert rules.workers == 2
    assert (rules.hang_timeout_of(0), rules.hang_timeout_of(1)) == (
        rules.hang_timeout,
        max(1.0, deadline_ms / 1000) if backup == "trained" else rules.hang_timeout,
    )
    assert rules.hang_timeout > 2 * deadline_ms / 1000
    assert isinstance(guard, Backup)
    await asyncio.gather(*(each.close() for each in upstreams))
    await guard.pool.stop()
    await server.stop()


async def test_an_upstream_that_takes_one_query_at_a_time_is_no_backup() -> None:
    small = Bounded(1)
    await small.start()
    try:
        url = f"{small.url}/v2/models/m"
        await refused("takes one query at a time", Server(), backup_upstream=url)
    finally:
        await small.stop()


@pytest.mark.parametrize("among", ["silent", "free places"])
@pytest.mark.parametrize("backup", ["trained", "upstream"])
async def test_who_is_not_there_at_the_start_takes_nobody_down(
    backup: str,
    among: str,
    finished: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The backup starts only after the upstreams, some of whom are known as lost by then."""
    monkeypatch.setattr(supervisor, "SOON", 0.0)
    server, small, away = Server(), Server(f"{PLACE}:smaller"), Server()
    options: dict[str, Any] = {"protection": finished, **SMALL}

    for each in (server, small, away):
        await each.start()
    await away.stop()
    if backup == "upstream":
        options = {"backup_upstream": f"{small.url}/v2/models/m", "policy": "small-backup"}
    if among == "silent":
        options["upstream"] = (away.url, server.url)
    else:
        options["upstreams_file"] = tmp_path / "upstreams"
        options["upstreams_file"].write_text(server.url)
    try:
        async with gateway(server, **options) as (address, relay, _):
            front = relay.front
            front.update_gauges()
            value = front.metrics.registry.get_sample_value
            assert value("codedinvnet_workers", {"state": "up"}) == 2
            assert front.ready
            assert scores(await asked(address, queries(1)))[1] == "direct"
    finally:
        await small.stop()


async def test_the_backups_server_gets_the_upstreams_token(tmp_path: Path) -> None:
    server, small, file = Server(), Server(f"{PLACE}:smaller"), tmp_path / "token"
    server.token = small.token = "secret"
    file.write_text("secret")
    await small.start()
    try:
        own = {"backup_upstream": f"{small.url}/v2/models/m", "upstream_token_file": file}
        async with gateway(server, policy="small-backup", **own) as (address, _, _):
            server.hold()
            assert scores(await asked(address, queries(1)))[1] == "decoded"
            server.go()
    finally:
        await small.stop()

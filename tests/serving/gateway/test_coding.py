"""A gateway that answers in place of late upstreams by a code, whose tasks they do."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import grpc
import pytest
from tritonclient.grpc import service_pb2 as pb

from codedinvnet.codes.base import Encoded
from codedinvnet.errors import UserError
from tests.codes.decodings import assert_is_decoded
from tests.observing import until
from tests.protect.conftest import finished  # noqa: F401
from tests.serving.faces.requests import share_memory
from tests.serving.gateway.asking import ask_grpc
from tests.serving.gateway.fakes import gateway
from tests.serving.gateway.servers import (
    MODEL,
    GrpcServer,
    Server,
    asked,
    asked_in_json,
    message,
    queries,
    scores,
)


@pytest.mark.parametrize("method", ["approxifer", "nercc"])
async def test_a_code_that_needs_no_training_makes_up_for_an_upstream(method: str) -> None:
    """Upstreams compute what the gateway has encoded, and one of them never answers."""
    servers = [Server() for _ in range(4)]

    async with gateway(*servers, method=method, deadline_ms=20000) as (address, _, _):
        servers[2].hold()
        x = queries(6)
        answer, outcome = scores(await asked(address, x))
        assert outcome == "decoded"
        for group in (slice(0, 3), slice(3, 6)):
            assert_is_decoded(answer[group], MODEL, method, x[group])
        sent = [body for server in servers for _, _, body in server.seen]
        mixed = [body for body in sent if not any(row.tobytes() in body for row in x)]
        assert len(mixed) > len(x)
        servers[2].go()


async def test_a_code_stands_before_servers_that_take_json_alone() -> None:
    servers = [Server() for _ in range(4)]
    for server in servers:
        server.takes_binary = False

    async with gateway(*servers, method="approxifer", deadline_ms=20000) as (address, _, _):
        servers[2].hold()
        x = queries(6)
        answer, outcome = await asked_in_json(address, x)
        assert outcome == "decoded"
        for group in (slice(0, 3), slice(3, 6)):
            assert_is_decoded(answer[group], MODEL, "approxifer", x[group])
        servers[2].go()


async def test_over_a_code_http_and_grpc_share_the_memory_for_requests() -> None:
    x = queries(1)
    message = pb.ModelInferRequest(model_name="m", raw_input_contents=[x.tobytes()])
    message.inputs.add(name="x", datatype="FP32", shape=x.shape)
    options: dict[str, Any] = {"deadline_ms": 60_000, "max_body_memory": 1 / 16, "grpc_port": 0}
    servers = [Server() for _ in range(3)]

    async with gateway(*servers, method="approxifer", **options) as (address, _, port):
        await share_memory(address, port, message)


async def test_tasks_of_a_code_that_take_long_are_asked_of_nobody_else() -> None:
    servers, options = [Server() for _ in range(3)], {"hang_timeout_ms": 200, "deadline_ms": 9000}

    async with gateway(*servers, method="approxifer", k=2, **options) as (address, *_):
        for server in servers:
            server.seen.clear()
            server.hold()
        answer = asyncio.create_task(asked(address, queries(2)))
        await until(lambda: sum(len(server.seen) for server in servers) == 3)
        await asyncio.sleep(1.0)  # several times the limit
        assert [len(server.seen) for server in servers] == [1, 1, 1]
        for server in servers:
            server.go()
        assert (await answer).status == 200


async def test_a_task_of_a_code_has_as_much_time_as_its_clients_wait() -> None:
    servers = [GrpcServer() for _ in range(3)]
    options: dict[str, Any] = {"method": "approxifer", "k": 2, "cancel": True}

    async with gateway(*servers, deadline_ms=60_000, **options) as (address, relay, _):

        async def left(*asked: Awaitable[Any]) -> list[float]:
            """Return how many seconds each upstream has for its task."""
            for server in servers:
                server.seen.clear()
            await asyncio.gather(*asked)
            await until(lambda: all(server.seen for server in servers))
            return [seconds for server in servers for _, _, seconds in server.seen]

        query = {"x": queries(1)}
        assert max(await left(asked(address, queries(2), timeout=20_000_000))) < 21  # it is rounded
        began = time.monotonic() - 50.0
        assert max(await left(relay.front.infer([query, query], began=began))) < 11
        two = (relay.front.infer([query], deadline=seconds) for seconds in (5.0, 40.0))
        assert min(await left(*two)) > 5  # one group: its tasks are for both


async def test_a_task_has_as_much_time_as_those_may_wait_who_join_its_group_later(
    finished: Path,  # noqa: F811
) -> None:
    """Their decoding may need it; direct answers are asked for as queries come."""
    servers = [GrpcServer() for _ in range(5)]
    options: dict[str, Any] = {"protection": finished, "method": "code", "cancel": True}
    patient = {"group_timeout_ms": 30_000, "deadline_ms": 60_000}

    async with gateway(*servers, **options, **patient) as (_, relay, _):
        front, query = relay.front, {"x": queries(1)}
        assert front.scheduler.systematic
        for server in servers:
            server.seen.clear()
        soon = asyncio.create_task(front.infer([query], deadline=20.0))
        await until(lambda: any(server.seen for server in servers))
        await asyncio.gather(soon, front.infer([query] * 3, deadline=50.0))
        await until(lambda: sum(len(server.seen) for server in servers) == 5)
        left = [seconds for server in servers for _, _, seconds in server.seen]
        assert min(left) > 40


async def test_a_protections_code_runs_beside_the_gateway(finished: Path) -> None:  # noqa: F811
    servers = [Server() for _ in range(5)]

    async with gateway(*servers, protection=finished, method="nercc", deadline_ms=20000) as (
        address,
        relay,
        _,
    ):
        assert relay.front.scheduler.dispatcher.code.k == 4
        assert scores(await asked(address, queries(4)))[1] == "decoded"


async def test_a_code_without_direct_answers_goes_with_coded_alone() -> None:
    servers = [Server() for _ in range(3)]
    with pytest.raises(UserError, match=r"^--policy: nercc has no direct answers.*not with auto"):
        async with gateway(*servers, method="nercc", policy="auto"):
            raise AssertionError("it runs")


async def test_what_cannot_be_encoded_ends_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from codedinvnet.codes.berrut import BerrutCode

    servers = [Server() for _ in range(3)]

    async with gateway(*servers, method="approxifer") as (address, _, _):

        def broken(*_: object) -> Encoded:
            raise ArithmeticError("no such point")

        monkeypatch.setattr(BerrutCode, "encode", broken)
        got = await asked(address, queries(1))
        assert got.status == 500
        assert "cannot encode: ArithmeticError: no such point" in json.loads(got.body)["error"]
        monkeypatch.undo()
        assert (await asked(address, queries(1))).status == 200


async def test_a_code_mixes_no_requests_of_a_sequence() -> None:
    servers = [GrpcServer() for _ in range(3)]

    async with gateway(*servers, method="approxifer", grpc_port=0) as (address, _, port):
        for server in servers:
            server.seen.clear()
        got = await asked(address, queries(1), sequence_id=7)
        assert (got.status, b"sequence_id: all requests" in got.body) == (400, True)
        x = pb.ModelInferRequest.FromString(message(queries(1)))
        x.parameters["sequence_id"].string_param = "a"
        with pytest.raises(grpc.aio.AioRpcError, match="sequence_id: all requests"):
            await ask_grpc(port, x.SerializeToString())
        assert not any(server.seen for server in servers)
        assert (await asked(address, queries(1), sequence_id=0)).status == 200

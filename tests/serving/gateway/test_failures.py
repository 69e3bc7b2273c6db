"""Upstreams that fail requests: who answers then, and how that is told and counted."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import grpc
import pytest

from codedinvnet.models.base import HEADER_LENGTH
from codedinvnet.models.upstream import described
from codedinvnet.serving.gateway import roster
from codedinvnet.serving.gateway.relay import Answer, Relay
from tests.observing import until
from tests.protect.conftest import PLACE
from tests.serving.gateway.asking import BODY, ask, ask_grpc, is_up, request
from tests.serving.gateway.fakes import Fake, GrpcFake, gateway
from tests.serving.gateway.servers import MODEL, GrpcServer, Server, asked, message, queries, scores


@asynccontextmanager
async def backed(
    *servers: Server | GrpcServer, **options: Any
) -> AsyncIterator[tuple[str, Relay, Server]]:
    """A gateway with a smaller model on a server of its own."""
    small = Server(f"{PLACE}:smaller")
    await small.start()
    try:
        url = f"{small.url}/v2/models/m"
        async with gateway(*servers, backup_upstream=url, **options) as (address, relay, _):
            yield address, relay, small
    finally:
        await small.stop()


def counted(relay: Relay, outcome: str) -> float:
    value = relay.front.metrics.registry.get_sample_value
    return value("codedinvnet_queries_total", {"outcome": outcome}) or 0.0


@pytest.mark.parametrize("upstreams", [1, 2])
async def test_the_error_of_the_last_upstream_is_a_failure(upstreams: int) -> None:
    fakes = [Fake() for _ in range(upstreams)]

    async with gateway(*fakes) as (address, relay, _):
        for fake in fakes:
            fake.status, fake.body = 500, b'{"error":"no memory"}'
        for _ in range(70):  # more than all retries that are saved up
            reply = await ask(address)
            assert (reply.status, reply.body) == (500, fakes[0].body)
            assert reply.headers["codedinvnet-outcome"] == "failed"
        assert (counted(relay, "failed"), counted(relay, "direct")) == (70, 0)


async def test_the_only_upstream_that_is_up_stays_so_though_it_fails_everything() -> None:
    failing, away = Fake(), Fake()

    async with gateway(failing, away, policy="uncoded") as (address, relay, _):
        await away.stop()
        await until(lambda: is_up(relay) == [True, False])
        failing.status = 500
        for _ in range(60):  # all saved retries, and more than a worker may fail in a row
            assert (await ask(address)).status == 500
        seen = len(failing.seen)
        for _ in range(10):
            assert (await ask(address)).status == 500
        assert len(failing.seen) == seen + 10
        assert relay.front.workers[0].deaths == 0


async def test_clients_hear_what_is_wrong_when_no_upstream_is_up() -> None:
    fakes = Fake(), Fake()

    async with gateway(*fakes, deadline_ms=1000) as (address, relay, _):
        assert (await ask(address)).status == 200
        for fake in fakes:
            await fake.stop()
        late = await ask(address)
        assert late.status == 504
        assert any(fake.url.encode() in late.body for fake in fakes)
        assert b"refused" in late.body
        await until(lambda: relay.front.supervisor.is_down)
        refused = await ask(address)
        assert refused.status == 503
        assert refused.body == b'{"error":"no upstream is up: try again later"}'
        assert counted(relay, "rejected") == 1


async def test_one_that_is_still_at_it_may_answer_what_another_fails() -> None:
    bad, slow = Fake(), Fake()

    async with gateway(bad, slow, policy="replicate", deadline_ms=60_000) as (address, relay, _):
        bad.status, slow.delay = 500, 0.03
        replies = [await ask(address) for _ in range(60)]
        assert {reply.status for reply in replies} == {200}
        assert counted(relay, "failed") == 0


@pytest.mark.parametrize("status", [201, 302])
async def test_no_client_over_grpc_is_told_ok_of_an_upstream_that_is_not(status: int) -> None:
    """What has no outputs must not look like an answer."""
    fake = Fake()
    fake.status, fake.body = status, b'{"error":"elsewhere"}'

    async with gateway(fake, grpc_port=0) as (_, _, port):
        with pytest.raises(grpc.aio.AioRpcError, match="elsewhere") as caught:
            await ask_grpc(port, request(bytes(12)))
        assert caught.value.code() is grpc.StatusCode.INTERNAL


async def test_what_an_upstream_itself_calls_too_late_is_sent_again_as_other_failures_are() -> None:
    """It is an answer, and no silence: what all upstreams say reaches the client."""
    fakes = GrpcFake(), GrpcFake()

    async with gateway(*fakes, grpc_port=0, policy="uncoded") as (_, relay, port):
        for fake in fakes:
            fake.code, fake.details = grpc.StatusCode.DEADLINE_EXCEEDED, "its queue was full"
        for _ in range(70):  # more than all retries that are saved up
            with pytest.raises(grpc.aio.AioRpcError, match="its queue was full") as caught:
                await ask_grpc(port, request(bytes(12)))
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert sum(len(fake.seen) for fake in fakes) < 140
        assert is_up(relay) == [True, True]


async def test_one_that_redirects_draws_no_requests() -> None:
    """It is quick, and always idle; its redirect is followed by nobody."""
    gone, steady = Fake(), Fake()

    async with gateway(gone, steady, policy="uncoded") as (address, relay, _):
        gone.status, gone.ready = 302, False
        gone.headers["Location"] = steady.url
        assert {(await ask(address)).status for _ in range(20)} == {200}
        assert is_up(relay) == [False, True]


@pytest.mark.parametrize("policy", ["auto", "small-backup"])
@pytest.mark.parametrize("upstreams", [1, 2])
async def test_the_backup_answers_what_all_upstreams_fail(policy: str, upstreams: int) -> None:
    servers = [Server() for _ in range(upstreams)]

    async with backed(*servers, policy=policy, deadline_ms=60_000) as (address, relay, _):
        for server in servers:
            server.status = 500
        exact = [await asked(address, queries(1), accept_decoded=False) for _ in range(70)]
        assert {(got.status, got.headers["codedinvnet-outcome"]) for got in exact} == {
            (500, "failed")
        }
        outcomes = Counter([scores(await asked(address, queries(1)))[1] for _ in range(20)])
        assert outcomes == {"decoded": 20}
        assert is_up(relay) == [True] * upstreams
        assert [view.deaths for view in relay.front.workers] == [0] * (upstreams + 1)


async def test_a_slow_backup_lets_no_upstream_be_asked_for_ever() -> None:
    """What waits for it is sent again only out of the retries' budget, which is spent here."""
    servers, requests = [Server(), Server()], 10

    async with backed(*servers, deadline_ms=60_000) as (address, _, small):
        for server in servers:
            server.status = 500
        for _ in range(70):
            await asked(address, queries(1), accept_decoded=False)
            before = sum(len(server.seen) for server in servers)
        small.hold()
        late = [asyncio.create_task(asked(address, queries(1))) for _ in range(requests)]
        await asyncio.sleep(1.0)
        small.go()
        assert {scores(reply)[1] for reply in await asyncio.gather(*late)} == {"decoded"}
        seen = sum(len(server.seen) for server in servers) - before
        assert requests <= seen <= requests + 3


async def test_the_backup_answers_what_takes_too_long_for_an_upstream() -> None:
    """Of the first request nobody knows what is normal."""
    server, options = Server(), {"deadline_ms": 60_000, "hang_timeout_ms": 300}

    async with backed(server, **options) as (address, relay, _):
        server.hold()
        assert scores(await asked(address, queries(1)))[1] == "decoded"
        assert [view.tasks for view in relay.front.workers] == [1, 1]
        assert is_up(relay) == [True]
        server.go()


@contextmanager
def no_more_files() -> Iterator[None]:
    """Let this process open no more files than it has open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("host", ["127.0.0.1", "upstreams.test"])
async def test_upstreams_are_not_to_blame_for_want_of_files_here(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def looked_up(name: str, *arguments: Any, **options: Any) -> Any:
        try:
            os.close(os.open(os.devnull, os.O_RDONLY))  # as a file of names is read
        except OSError:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure") from None
        return look_up("127.0.0.1", *arguments, **options)

    look_up = socket.getaddrinfo
    if host != "127.0.0.1":
        monkeypatch.setattr(socket, "getaddrinfo", looked_up)
    monkeypatch.setattr(roster, "PROBE_PERIOD", 0.05)
    fakes = Fake(), Fake()

    for fake in fakes:
        await fake.start()
    urls = tuple(f"http://{host}:{fake.port}" for fake in fakes)
    options = {"upstream": urls, "policy": "uncoded", "slots": 32, "hang_timeout_ms": 400}
    async with gateway(*fakes, deadline_ms=60_000, **options) as (address, relay, _):

        def asked() -> asyncio.Task[Any]:
            return asyncio.create_task(relay.answer("", "http", BODY, ()))

        def seen() -> int:
            return sum(len(fake.seen) for fake in fakes)

        for fake in fakes:
            fake.hold()
        kept = [asked() for _ in range(2)]
        await until(lambda: seen() == 2)
        with no_more_files():
            others = [await asked() for _ in range(12)]
            await asyncio.sleep(1.0)  # both are late by now, and were looked at again and again
            assert is_up(relay) == [True, True]
        assert {(answer.reply.status, answer.outcome) for answer in others} == {(503, "failed")}
        assert b"more files" in others[0].reply.body
        assert seen() == 2
        for fake in fakes:
            fake.go()
        assert [(await answer).reply.status for answer in kept] == [200, 200]
        assert (await ask(address)).status == 200
        assert [view.deaths for view in relay.front.workers] == [0, 0]


async def test_over_grpc_they_are_neither() -> None:
    gone, steady = GrpcFake(), Fake()

    async with gateway(gone, steady, policy="uncoded", deadline_ms=60_000) as (_, relay, _):
        with no_more_files():
            await gone.stop()
            answers = [await relay.answer("", "grpc", request(bytes(12)), ()) for _ in range(60)]
            assert is_up(relay)[0]
            assert relay.front.workers[0].deaths == 0
        statuses = {answer.reply.status for answer in answers}
        assert 14 in statuses
        assert statuses <= {0, 14}
        await until(lambda: is_up(relay) == [False, True])  # now that it can be looked for


async def test_with_a_backup_they_are_neither() -> None:
    """Nor when all retries are spent."""
    gone, steady = GrpcServer(), Server()
    options = {"policy": "small-backup", "group_timeout_ms": 10, "deadline_ms": 60_000}

    async with backed(gone, steady, **options) as (_, relay, small):
        tasks: list[asyncio.Task[Answer]] = []
        with no_more_files():
            await gone.stop()
            small.hold()
            for _ in range(8):
                some = [relay.answer("", "grpc", message(queries(1)), ()) for _ in range(20)]
                tasks += map(asyncio.create_task, some)
                await asyncio.sleep(0.2)
            assert is_up(relay)[0]
            assert relay.front.workers[0].deaths == 0
            small.go()
            replies = [(await task).reply for task in tasks]
        assert {reply.status for reply in replies} <= {0, 14}


async def test_the_backup_answers_what_cannot_be_sent_for_want_of_files() -> None:
    server = Server()
    head, blobs = described({"x": queries(1)}, MODEL.signature.inputs)
    body = b"".join([head, *blobs])
    headers = ((HEADER_LENGTH.lower(), str(len(head))),)

    async with backed(server, slots=8, deadline_ms=60_000) as (_, relay, _):
        server.hold()
        server.seen.clear()  # what it was asked at the start
        kept = asyncio.create_task(relay.answer("", "http", body, headers))
        await until(lambda: len(server.seen) == 1)
        with no_more_files():
            assert (await relay.answer("", "http", body, headers)).outcome == "decoded"
        server.go()
        assert (await kept).outcome == "direct"

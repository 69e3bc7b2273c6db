"""Which requests are sent to two upstreams, when, and what becomes of the slower answer."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest

from codedinvnet.common.errors import UserError
from codedinvnet.gateway import attempts
from codedinvnet.gateway.calls import ENDS, State
from codedinvnet.gateway.metrics import GatewayMetrics
from codedinvnet.gateway.routes import Limits, Routes, read_rule
from tests.gateway.support import INFER, V2, Running, gateway, until
from tests.upstream import Handler, Request, Upstream, answer

STALL = 0.5


def taking(seconds: float, stalls: Callable[[], bool] = lambda: False) -> Handler:
    """Return a handler that answers after some time, and now and then after a stall."""

    async def serve(request: Request, writer: asyncio.StreamWriter) -> bytes:
        await asyncio.sleep(STALL if stalls() else seconds)
        return answer(request.body or request.path.encode())

    return serve


def routes_of(*rules: str) -> Routes:
    """Return the routes of a gateway with these rules."""
    return Routes([read_rule(text, "--route") for text in rules], GatewayMetrics(), Limits(5.0))


@pytest.mark.parametrize(
    ("request_line", "hedged"),
    [
        ("GET /any?x", True), ("HEAD /any", True), ("POST /any", False), ("PUT /any", False),
        ("DELETE /x", False), ("POST /v2/models/m/infer", True),
        ("POST /v2/models/m/versions/2/infer", True), ("POST /v2/models/m/generate", False),
        ("POST /v1/models/m:predict", True), ("POST /v1/models/m:explain", False),
        ("POST /predictions/m", True), ("POST /predictions/m/1.0", True),
        ("POST /invocations", True), ("POST /v1/embeddings", True), ("POST /v1/rerank", True),
        ("POST /v1/chat/completions", False), ("POST /v1/completions", False),
        ("POST /predict", True), ("POST /predict/x", False), ("GET /pay", False),
        ("GET /p%61y", False), ("PATCH /all/of/it", True),
    ],
)  # fmt: skip
def test_which_routes_are_hedged(request_line: str, hedged: bool) -> None:
    routes = routes_of("GET /pay hedge=off", "post /predict hedge=on", "* /all/* hedge=5ms:")
    method, target = request_line.encode().split(b" ")

    assert routes.find(method, target).is_repeatable is hedged


def test_routes_that_are_none_and_paths_without_end() -> None:
    for text in ("/predict", "POST", "POST predict", "PO(T /x", "PSOT /x", "POST /a b"):
        with pytest.raises(UserError, match="route: "):
            routes_of(text)
    for said in (
        "deadline", "deadline=", "deadline=5", "deadline=0s", "dead=5s", "idle=-1s", "hedge=yes",
        "hedge=:", "hedge=9ms:5ms", "idle=1d",
    ):  # fmt: skip
        with pytest.raises(UserError, match="route: "):
            routes_of(f"GET /x {said}")
    routes = routes_of()
    for number in range(5000):
        routes.find(b"POST", b"/v2/models/%d/infer" % number)
        routes.find(b"GET", b"/%d" % number)
    assert len(routes.all()) < 70


async def test_names_that_clients_choose_are_shown_only_if_they_are_short_and_plain() -> None:
    async with gateway(Upstream()) as g:
        names = ("m" * 60_000, "m" * 65, "a%22b", "a%0ab", "%e2%80%ae", "a b", "%c3%a9", "a/b" * 99)
        for name in names:
            await g.ask("POST", f"/v2/models/{name.replace(' ', '%20')}/infer", INFER)
        await g.ask("POST", "/v2/models/Llama-3.1_8b/versions/2/infer", INFER)
        shown = (await g.ask("GET", "/metrics")).body.decode()
        routes = {route.name for route in g.gateway.routes.all()}
    own = "POST /v2/models/Llama-3.1_8b/versions/2/infer"
    assert routes == {own, "POST /v2/models/*/infer"}
    assert f'route="{own}"' in shown
    assert "mmm" not in shown


async def learn(g: Running, count: int = 160, path: str = V2, body: bytes | None = INFER) -> None:
    """Send requests until it is known how long they take."""
    for begin in range(0, count, 4):
        method = "GET" if body is None else "POST"
        await asyncio.gather(*(g.ask(method, path, body) for _ in range(begin, begin + 4)))


async def test_a_copy_makes_up_for_a_stall() -> None:
    stalls: list[bool] = []
    handler = taking(0.02, lambda: bool(stalls) and stalls.pop())
    async with gateway(handler, handler) as g:
        await learn(g)
        stalls.append(True)
        assert (await g.ask("POST", V2, INFER)).body == INFER
        assert g.metric("hedges_total", result="won") >= 1
        assert g.metric("hedge_delay_seconds") == 0.0  # it is read off on request
        metrics = (await g.ask("GET", "/metrics")).body.decode()

    assert 'codedinvnet_gateway_hedges_total{result="won"' in metrics
    delays = [
        line for line in metrics.splitlines() if line.startswith("codedinvnet_gateway_hedge_")
    ]
    assert 0.02 < float(delays[0].rpartition(" ")[2]) < STALL


@pytest.mark.parametrize(
    ("options", "copies"),
    [({}, 0), ({"hedge_delay_ms": "5:"}, 0), ({"hedge_delay_ms": "5:50"}, 1)]
    + [({"route": (f"POST /v2/* hedge={said}",)}, n) for said, n in (("50ms", 1), ("5ms:", 0))],
)
async def test_what_takes_long_at_first_is_copied_only_after_a_delay_that_is_given(
    options: dict[str, Any], copies: int
) -> None:
    """A prompt that takes a minute would take one of each upstream."""
    async with gateway(taking(0.7), taking(0.7), **options) as g:
        assert (await g.ask("POST", V2, INFER)).body == INFER
        assert sum(len(upstream.requests) for upstream in g.upstreams) == 1 + copies


def test_an_attempt_ends_once_and_not_before_it_is_sent() -> None:
    for end in ENDS:
        for state in State:
            with pytest.raises(RuntimeError):
                end.to(state)
    with pytest.raises(RuntimeError):
        State.CONNECT.to(State.COMPLETE)


async def test_of_two_answers_that_are_held_the_one_that_is_not_needed_ends_as_well(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attempts, "UNSURE", 0.0)
    monkeypatch.setattr(attempts, "HOLD", 0.3)
    async with gateway(taking(0.1), taking(0.1), route=("POST /v2/* hedge=50ms",)) as g:
        assert (await g.ask("POST", V2, INFER)).body == INFER
        await until(lambda: g.metric("attempts_total", result="ok") == 2)


SHARED = b'{"inputs":[{"parameters":{"shared_memory_region":"r"}}]}'
SEQUENCE = b'{"parameters":{"sequence_id":7},"inputs":[]}'


REQUESTS: list[tuple[str, bytes, dict[str, str], bool]] = [
    (V2, INFER, {}, True),
    (V2, b'{"parameters":{"sequence_id":0},"inputs":[]}', {}, True),
    (V2, SEQUENCE, {}, False),
    (V2, b'{"parameters":{"sequence_id" : "a"}}', {}, False),
    (V2, b'{"parameters":{"sequence\\u005fid":7},"inputs":[]}', {}, False),
    (V2, b'{"parameters":{"\\u0073equence_id":7},"inputs":[]}', {}, False),
    (V2, b'{"inputs":[{"data":["caf\\u00e9 \\u003c\\u0026"]}]}', {}, True),
    (V2, SHARED, {}, False),
    (V2, b"[" + b"0," * 300_000 + SHARED + b"]", {}, False),
    (V2, b"[" + b"0," * 300_000 + INFER + b"]", {}, True),
    (V2, b"{}" + SHARED, {"Inference_Header_Content_Length": "2"}, True),
    (V2, INFER, {"content_encoding": "gzip"}, False),
    (V2, INFER, {"x_hedge": "off"}, False),
    ("/v1/embeddings", SEQUENCE, {}, True),
    ("/other", INFER, {}, False),
]  # path, body, fields, and whether it is copied


async def test_which_requests_are_copied() -> None:
    stalled = set[str]()

    async def serve(request: Request, writer: asyncio.StreamWriter) -> bytes:
        name = request.fields.get("x-id", "")
        if name and name not in stalled:
            stalled.add(name)
            await asyncio.sleep(STALL)
        await asyncio.sleep(0.02)
        return answer(request.body)

    async with gateway(serve, serve, route=("POST /v2/* hedge=on",)) as g:
        for path in sorted({path for path, *_ in REQUESTS}):
            await learn(g, path=path)
        for number, (path, body, fields, copies) in enumerate(REQUESTS):
            # Long bodies have times of their own; late ones without a copy would make others late.
            await learn(g, 160 if len(body) > 1000 else 40, path, body)
            found = await g.ask("POST", path, body, x_id=str(number), **fields)
            sent = sum(upstream.seen[str(number)] for upstream in g.upstreams)
            assert found.body == body
            assert sent == (2 if copies else 1), (path, body[:99], fields)


@pytest.mark.parametrize(("cancel", "closes"), [(None, False), ("close", True), ("leave", False)])
async def test_what_becomes_of_the_slower_one(cancel: str | None, closes: bool) -> None:
    stalls: list[bool] = []
    handler = taking(0.02, lambda: bool(stalls) and stalls.pop())
    async with gateway(handler, handler, cancel=cancel) as g:
        await learn(g)
        stalls.append(True)
        await g.ask("POST", V2, INFER)
        await asyncio.sleep(STALL)
        sent = sum(len(upstream.requests) for upstream in g.upstreams)
        assert (g.metric("attempts_total", result="ok") < sent) is closes
        assert g.gateway.memory.used == 0


@pytest.mark.parametrize("count", [300])
async def test_what_must_not_be_repeated_reaches_one_upstream(count: int) -> None:
    """Upstreams reset, close and stall; refused connections alone are tried elsewhere."""
    await unrepeated(count, random.Random(1))


async def unrepeated(count: int, chance: random.Random) -> None:
    async def serve(request: Request, writer: asyncio.StreamWriter) -> bytes | None:
        kind = chance.random()
        if kind < 0.1:
            writer.transport.abort()
        elif kind < 0.2:
            return None
        elif kind < 0.25:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
            return None
        elif kind < 0.3:
            return answer(b"busy", 503)
        elif kind < 0.32:
            await asyncio.sleep(0.2)
        return answer(request.body)

    async with gateway(serve, serve, serve) as g:

        async def ask(number: int) -> None:
            body = b"%d" % number
            found = await g.ask("POST", "/orders", body, x_id=str(number))
            assert (found.status, found.body) == (200, body) or found.status in (502, 503), found

        async def restart() -> None:
            while True:
                upstream = chance.choice(g.upstreams)
                await asyncio.sleep(0.05)
                await upstream.stop()
                await asyncio.sleep(0.05)
                await upstream.start()

        restarting = asyncio.create_task(restart())
        for begin in range(0, count, 20):
            await asyncio.gather(*map(ask, range(begin, min(count, begin + 20))))
        restarting.cancel()
        total = sum((upstream.seen for upstream in g.upstreams), start=type(g.upstreams[0].seen)())

    assert {key: sent for key, sent in total.items() if sent > 1 and key} == {}


async def test_a_refused_connection_is_tried_elsewhere() -> None:
    down = Upstream()
    await down.start()
    async with gateway(down, Upstream()) as g:
        await down.stop()
        bodies = [b"%d" % number for number in range(20)]  # at once: one sees it, all are moved
        found = await asyncio.gather(*(g.ask("POST", "/orders", body) for body in bodies))
        assert [one.body for one in found] == bodies

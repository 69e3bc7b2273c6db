"""What the page draws: the last quarter of an hour, in steps of ten seconds."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest

from tests.clock import Clock
from tests.gateway.support import INFER, V2, Handler, Request, Running, answer, gateway
from tests.gateway.test_hedging import learn, taking

STEPS, STEP = 90, 10.0


@pytest.fixture
def anyio_backend() -> str:
    """asyncio's own loop, whose clock can be put forward."""
    return "asyncio"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(time, "monotonic", found)
    return found


async def status(g: Running, query: str = "") -> tuple[dict[str, Any], dict[str, Any]]:
    """Return errors and history."""
    found = json.loads((await g.ask("GET", f"/codedinvnet/status{query}")).body)
    return found["errors"], found["history"]


async def say(request: Request, writer: asyncio.StreamWriter) -> bytes | None:
    """Answer as the path asks for."""
    if request.path == "/cut":
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2000000\r\n\r\n" + b"x" * 1_500_000)
        await writer.drain()
        return None
    if request.path == "/never":
        await asyncio.sleep(STEP)
        return None
    return answer(b"said", int(request.path[1:]))


async def test_requests_and_errors_are_counted_by_the_steps_that_they_ended_in(
    clock: Clock,
) -> None:
    async with gateway(say, say) as g:
        for path in ("/200", "/404", "/200"):
            await g.ask("POST", path)
        assert set((await status(g))[1]["requests"]) == {None}
        clock.forward(STEP)
        for path in ("/500", "/500", "/200", "/200"):
            await g.ask("POST", path)
        clock.forward(3 * STEP)
        await g.ask("POST", "/500")
        errors, history = await status(g)
        clock.forward(STEPS * STEP)
        later, drawn = await status(g)
        clock.forward(STEPS * STEP)
        at_last, _ = await status(g)

    before = [None] * (STEPS - 4)
    assert history["step_seconds"] == STEP
    assert history["requests"] == [*before, 3, 4, 0, 0]
    assert history["errors"] == [*before, 0, 2, 0, 0]
    assert history["p50_ms"][-2:] == history["p99_ms"][-2:] == [None, None]
    assert 0 < history["p50_ms"][-3] <= history["p99_ms"][-3] < 5000
    error = {"route": "other", "outcome": "direct", "status": 500, "count": 3, "seconds_ago": 0.0}
    assert errors == {"requests": 8, "errors": [error]}
    assert drawn["requests"] == [1, *[0] * (STEPS - 1)]
    assert later == {"requests": 1, "errors": [{**error, "count": 1, "seconds_ago": 900.0}]}
    assert at_last == {"requests": 0, "errors": []}


async def test_a_route_has_a_history_of_its_own(clock: Clock) -> None:
    async with gateway(say, say, route=("POST /500 hedge=on", "POST /200 hedge=on")) as g:
        await g.ask("POST", "/500")
        await g.ask("POST", "/200")
        clock.forward(STEP)
        errors, of_all = await status(g)
        same_errors, of_one = await status(g, "?route=POST%20/200")
        unknown = await g.ask("GET", "/codedinvnet/status?route=GET%20/none")

    assert (of_all["requests"][-1], of_all["errors"][-1]) == (2, 1)
    assert (of_one["requests"][-1], of_one["errors"][-1]) == (1, 0)
    assert errors == same_errors
    assert unknown.status == 404


@pytest.mark.parametrize(
    ("method", "path", "failed"),
    [
        ("POST", "/503", ("direct", 503)), ("GET", "/429", ("failed", 429)),
        ("GET", "/never", ("deadline", 504)), ("GET", "/cut", ("aborted", 200)),
        ("POST", "/429", None), ("GET", "/404", None),
    ],
)  # fmt: skip
async def test_what_is_an_error(
    method: str, path: str, failed: tuple[str, int] | None, clock: Clock
) -> None:
    async with gateway(say, say, deadline_ms=600.0) as g:
        await g.raw(f"{method} {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
        clock.forward(STEP)
        errors, history = await status(g)
    found = [(each["outcome"], each["status"]) for each in errors["errors"]]
    assert found == ([failed] if failed else [])
    assert (history["requests"][-1], history["errors"][-1]) == (1, len(found))
    in_vain = failed is not None and failed[0] in ("failed", "deadline")
    assert (history["p99_ms"][-1] >= 590.0) is in_vain  # as long as its deadline


async def test_what_it_would_be_without_copies_is_told_where_it_is_known(clock: Clock) -> None:
    stalls: list[bool] = []
    handler: Handler = taking(0.01, lambda: bool(stalls) and stalls.pop())
    async with gateway(handler, handler, hold_out=100.0) as g:
        await learn(g)
        clock.forward(STEP)
        _, few = await status(g)
        for _ in range(8):
            stalls.append(True)
            await g.ask("POST", V2, INFER)
            clock.forward(STEP)
        _, found = await status(g)
        clock.forward(300)
        _, later = await status(g)

    assert few["without"][:2] == [None, None]
    *before, last = found["without"]
    assert before == [None, None]
    p50 = last["p50"]
    assert 10 <= p50["low_ms"] <= p50["value_ms"] <= p50["high_ms"] < 500
    assert p50["text"].endswith(")")
    assert last["p99"]["low_ms"] >= 10
    assert last["p99"]["high_ms"] is None
    assert later["without"][1] is not None
    assert later["without"][2] is None

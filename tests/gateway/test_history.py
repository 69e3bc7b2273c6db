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

pytestmark = pytest.mark.anyio
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


async def history(g: Running) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((await g.ask("GET", "/codedinvnet/status")).body)["history"]
    return found


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
        assert set((await history(g))["requests"]) == {None}
        clock.forward(STEP)
        for path in ("/500", "/500", "/200", "/200"):
            await g.ask("POST", path)
        clock.forward(3 * STEP)
        await g.ask("POST", "/500")
        found = await history(g)
        clock.forward(STEPS * STEP)
        later = await history(g)
        clock.forward(STEPS * STEP)
        at_last = await history(g)

    before = [None] * (STEPS - 4)
    assert found["step_seconds"] == STEP
    assert found["requests"] == [*before, 3, 4, 0, 0]
    assert found["errors"] == [*before, 0, 2, 0, 0]
    assert found["p50_ms"][-2:] == found["p99_ms"][-2:] == [None, None]
    assert 0 < found["p50_ms"][-3] <= found["p99_ms"][-3] < 5000
    assert found["total"] == 8
    error = {"route": "other", "outcome": "direct", "status": 500, "count": 3, "seconds_ago": 0.0}
    assert found["failed"] == [error]
    assert later["requests"] == [1, *[0] * (STEPS - 1)]
    assert (later["total"], later["failed"]) == (1, [{**error, "count": 1, "seconds_ago": 900.0}])
    assert (at_last["total"], at_last["failed"]) == (0, [])


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
        found = await history(g)
    assert [(each["outcome"], each["status"]) for each in found["failed"]] == (
        [failed] if failed else []
    )
    assert (found["requests"][-1], found["errors"][-1]) == (1, int(failed is not None))
    in_vain = failed is not None and failed[0] in ("failed", "deadline")
    assert (found["p99_ms"][-1] >= 590.0) is in_vain  # as long as its deadline


async def test_what_it_would_be_without_copies_is_told_where_it_is_known(clock: Clock) -> None:
    stalls: list[bool] = []
    handler: Handler = taking(0.01, lambda: bool(stalls) and stalls.pop())
    async with gateway(handler, handler, hold_out=100.0) as g:
        await learn(g)
        clock.forward(STEP)
        few = await history(g)
        for _ in range(8):
            stalls.append(True)
            await g.ask("POST", V2, INFER)
            clock.forward(STEP)
        found = await history(g)
        clock.forward(300)
        later = await history(g)

    assert few["without"][:2] == [None, None]
    *before, last = found["without"]
    assert before == [None, None]
    p50 = last["p50"]
    assert 10 <= p50["low_ms"] <= p50["value_ms"] <= p50["high_ms"] < 800
    assert p50["text"].endswith(")")
    assert last["p99"]["low_ms"] >= 10
    assert last["p99"]["high_ms"] is None
    assert later["without"][1] is not None
    assert later["without"][2] is None

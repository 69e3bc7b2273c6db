"""The open-loop load client, in front of a server of this process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from aiohttp import web

from benchmarks.command_line import main
from benchmarks.load import Load, open_loop

TIMES = [i / 200 for i in range(40)]


class Server:
    """Answers POST with the body, and does what `answer` says with the others."""

    def __init__(self) -> None:
        self.seen = 0
        self.good = 1 << 30
        self.held = asyncio.Event()

    async def answer(self, request: web.Request) -> web.Response:
        self.seen += 1
        body = await request.read()
        if body == b"refused":
            return web.Response(status=503)
        if self.seen > self.good:
            await self.held.wait()
        return web.Response(body=body)


@pytest.fixture
async def server() -> AsyncIterator[tuple[Server, str]]:
    made, app = Server(), web.Application()
    app.router.add_route("*", "/{path:.*}", made.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield made, f"http://127.0.0.1:{runner.addresses[0][1]}"
    made.held.set()
    await runner.cleanup()


async def test_answers_and_errors_are_counted(server: tuple[Server, str]) -> None:
    made, url = server
    found = await Load(f"{url}/a", [b"even", b"odd"]).run(TIMES)
    assert (found["requests"], found["answered"], found["errors"]) == (40, 40, {})
    assert 0 < found["p50_ms"] <= found["p99_ms"] <= found["max_ms"]
    assert made.seen == 40
    load = Load(
        url, [b"even", b"refused"], right=lambda number, body: body == b"even" and number > 0
    )
    found = await load.run(TIMES)
    assert (found["answered"], found["errors"]) == (19, {"HTTP 503": 20, "wrong": 1})
    assert np.isfinite(load.latencies[2::2]).all()
    assert np.isinf([load.latencies[0], *load.latencies[1::2]]).all()
    assert (found["p90_ms"], found["max_ms"], found["mean_ms"]) == (None, None, None)
    nowhere = await Load("http://127.0.0.1:1").run(TIMES[:3])
    assert (nowhere["answered"], nowhere["goodput_per_s"]) == (0, 0)
    assert list(nowhere["errors"].values()) == [3]


@pytest.mark.parametrize("good", [20, 0])
async def test_a_server_that_stands_still_holds_up_nobodys_departure(
    server: tuple[Server, str], good: int
) -> None:
    """What is never answered is infinitely late."""
    made, url = server
    made.good = good
    load = Load(url, timeout=1.0)
    found = await load.run(TIMES)
    assert found["answered"] == good
    assert found["sent_late_p99_ms"] < 500
    assert (found["goodput_per_s"] > 0) == (good > 0)
    assert found["p99_ms"] is None


def test_what_a_call_raises_is_raised_when_all_are_over() -> None:
    over = []

    async def call(number: int, _: float) -> None:
        await asyncio.sleep(0.01 * number)
        if number == 1:
            raise ValueError("of the second")
        over.append(number)

    with pytest.raises(ValueError, match="of the second"):
        asyncio.run(open_loop(call, [0.0] * 5, "some"))
    assert sorted(over) == [0, 2, 3, 4]


async def test_the_command_line(
    server: tuple[Server, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, url = server
    body = tmp_path / "body.json"
    body.write_text("{}")
    words = ["load", f"{url}/a", "--body", str(body), "--rate", "100", "--seconds", "0.2"]
    assert await asyncio.to_thread(main, [*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["answered"] == made.seen == 20
    body.unlink()
    assert await asyncio.to_thread(main, words) == 2
    assert "--body: cannot read" in capsys.readouterr().err

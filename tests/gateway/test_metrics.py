"""Metrics tell the truth: each request once, each attempt by its cause, and what nobody read."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.gateway.support import Request, answer, gateway, until

CHUNKED = "HTTP/1.1 {} X\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nno\r\n"


@pytest.mark.parametrize("ends", [True, False])
async def test_a_stream_is_counted_once_it_has_ended(ends: bool) -> None:
    proceed = asyncio.Event()

    async def stream(request: Request, writer: asyncio.StreamWriter) -> bytes | None:
        writer.write(CHUNKED.format(200).encode())
        await proceed.wait()
        return b"0\r\n\r\n" if ends else None

    async with gateway(stream, stream) as g:
        asking = asyncio.ensure_future(g.raw(b"POST /any HTTP/1.1\r\nHost: a\r\n\r\n"))
        await until(lambda: g.metric("request_seconds_count") == 1)
        assert g.metric("requests_total") == 0
        proceed.set()
        await asking
        outcome = "direct" if ends else "aborted"
        assert g.metric("requests_total", outcome=outcome, status="2xx") == 1
        assert g.metric("requests_total") == 1


@pytest.mark.parametrize(
    ("status", "result"),
    [(200, "ok"), (404, "error"), (501, "error"), (500, "status"), (429, "limited")],
)
@pytest.mark.parametrize("whole", [True, False])
async def test_attempts_are_counted_by_cause(status: int, result: str, whole: bool) -> None:
    """Also where the answer is passed on, whatever it says, and as it comes."""

    async def say(request: Request, writer: asyncio.StreamWriter) -> bytes:
        return answer(b"no", status) if whole else f"{CHUNKED.format(status)}0\r\n\r\n".encode()

    async with gateway(say) as g:
        assert (await g.ask("POST", "/any")).status == status
        assert g.metric("attempts_total", result=result) == g.metric("attempts_total") == 1


async def test_the_queue_is_timed_by_route_also_where_no_upstream_comes_free() -> None:
    async def stalls(*_: object) -> bytes:
        await asyncio.sleep(3600)
        return b""

    async with gateway(stalls, slots=1, deadline_ms=500.0) as g:
        asked = await asyncio.gather(*[g.ask("POST", "/any") for _ in range(6)])
        late = [each.status for each in asked].count(504)  # others were refused at once
        assert 0 < len(g.upstreams[0].requests) < late
        assert g.metric("queue_seconds_count", route="other") == late
        assert g.metric("queue_seconds_sum", route="other") > 0.5
        assert g.metric("queue_seconds_count") == late


async def test_refusals_of_what_is_not_read_are_counted(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("secret\n")
    async with gateway(_never, token_file=token, max_memory=1.0) as g:
        auth, body = "Bearer secret", b"x" * 200_000
        assert (await g.ask("POST", "/any")).status == 401
        assert (await g.ask("POST", "/any", body, authorization=auth)).status == 413
        await g.raw(b"GET / HTTP/1.1\r\n\r\n")
        assert (await g.ask("GET", "/metrics", authorization=auth)).status == 200
        assert g.metric("requests_total", route="unread", outcome="refused", status="4xx") == 3
        assert g.metric("requests_total") == 3


async def _never(request: Request, writer: asyncio.StreamWriter) -> bytes:
    raise AssertionError

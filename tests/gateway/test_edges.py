"""Edges of HTTP on the clients' side, and what is refused."""

from __future__ import annotations

import asyncio

import pytest

from tests.gateway.support import gateway
from tests.observing import until
from tests.upstream import Raw, Request, Upstream, answer, saying

POST = b"POST /any HTTP/1.1\r\nHost: a\r\n"
GET = b"GET /any HTTP/1.1\r\nHost: a\r\n"


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab", 400),
        (POST + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (POST + b"Transfer-Encoding: xchunked\r\n\r\n", 501),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\nab\r\n0\r\n\r\n", 400),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n0\r\nA: b\nC: d\r\n\r\n", 400),
        (b"POST /any HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"GET /any HTTP/1.1\nHost: a\n\n", 400),
        (GET + b"Host: b\r\n\r\n", 400),
        (b"GET /any HTTP/1.1\r\n\r\n", 400),
        (b"GET any HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET /any HTTP/3.0\r\nHost: a\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\n", 400),
        (GET + b"A: " + b"b" * 70_000 + b"\r\n\r\n", 431),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 431),
        (GET + b"Upgrade: websocket\r\nConnection: Upgrade\r\n\r\n", 501),
        (b"CONNECT a:443 HTTP/1.1\r\nHost: a\r\n\r\n", 501),
        (POST + b"Expect: tea\r\nContent-Length: 1\r\n\r\na", 417),
        (POST + b"Content-Length: 1000000000000\r\n\r\n", 413),
        (POST + b"Content-Length: 1000000000000000000000\r\n\r\n", 400),
        (POST + b"Transfer-Encoding: chunked\r\n\r\nfffffff\r\n" + bytes(200_000), 413),
    ],
)
async def test_smuggled_and_malformed_requests_reach_no_upstream(data: bytes, status: int) -> None:
    """Each is followed by a request that would be another's if the first were read otherwise.

    The grammar itself is tested in net/test_http1.py.
    """
    follow = b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"
    async with gateway(Upstream(), max_memory=1.0) as g:
        found = await g.raw(data + follow)
        await asyncio.sleep(0.01)

        assert found.startswith(b"HTTP/1.1 %d " % status)
        assert found.count(b"HTTP/1.1") == 1
        assert b'{"error": "' in found
        assert b"Connection: close" in found
        assert g.upstreams[0].requests == []
        assert g.gateway.memory.used == 0


async def test_pipelined_requests_are_answered_in_order() -> None:
    async def serve(request: Request, writer: asyncio.StreamWriter) -> bytes:
        await asyncio.sleep(0.02 if request.path == "/0" else 0)
        return answer(request.path.encode())

    data = b"".join(b"GET /%d HTTP/1.1\r\nHost: a\r\n\r\n" % i for i in range(100))
    async with gateway(Upstream(serve)) as g:
        found = await g.raw(data)

    found = found.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"")  # asks whether it is still there
    bodies = [part.rpartition(b"/")[2] for part in found.split(b"HTTP/1.1 200 Fine")[1:]]
    assert bodies == [b"%d" % i for i in range(100)]


async def test_a_pipelined_body_may_come_in_parts_and_empty_lines_before_a_request() -> None:
    data = POST + b"Content-Length: 5\r\n\r\nhello\r\n" + POST
    data += b"Content-Length: 3\r\nConnection: close\r\n\r\nyou"
    async with gateway(Upstream()) as g:
        reader, writer = await asyncio.open_connection("127.0.0.1", g.client.origin.port)
        for begin in range(0, len(data), 7):
            writer.write(data[begin : begin + 7])
            await asyncio.sleep(0.001)
        found = await reader.read()
        writer.close()

    assert found.count(b"hello") == found.count(b"you") == 1


async def test_a_client_that_expects_to_be_told_to_go_on() -> None:
    async with gateway(Upstream()) as g:
        reader, writer = await asyncio.open_connection("127.0.0.1", g.client.origin.port)
        writer.write(POST + b"Content-Length: 2\r\nExpect: 100-continue\r\n\r\n")
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"ok")
        assert b"200" in await reader.readuntil(b"\r\n\r\n")
        writer.close()
        assert "expect" not in g.upstreams[0].requests[0].fields


async def test_a_half_closed_client_is_answered_and_one_that_left_is_not() -> None:
    async with gateway(Upstream(saying(b"late", after=0.3))) as g:
        found = await g.raw(GET + b"\r\n")
        assert found.startswith(b"HTTP/1.1 100 Continue\r\n\r\n")
        assert found.endswith(b"late")
        _, writer = await asyncio.open_connection("127.0.0.1", g.client.origin.port)
        writer.write(GET + b"\r\n")
        await until(lambda: len(g.upstreams[0].requests) == 2)
        writer.transport.abort()
        await until(lambda: g.metric("requests_total", outcome="cancelled") == 1)


@pytest.mark.parametrize(("cancel", "told"), [(None, True), ("close", True), ("leave", False)])
async def test_an_upstream_is_told_when_a_client_leaves_before_the_answer(
    cancel: str | None, told: bool
) -> None:
    begun, closed = asyncio.Event(), asyncio.Event()

    async def computes(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        if request.startswith(b"POST"):
            begun.set()
            await reader.read()  # to the end of the connection
            closed.set()
        writer.write(answer(b"", 404))
        writer.close()

    async with gateway(Raw(computes), cancel=cancel) as g:
        _, writer = await asyncio.open_connection("127.0.0.1", g.client.origin.port)
        writer.write(POST + b"Content-Length: 0\r\n\r\n")
        await begun.wait()
        writer.close()  # as a client does whose own time-out is over
        await until(lambda: g.metric("requests_total", outcome="cancelled") == 1)
        await asyncio.sleep(0.05)
        assert closed.is_set() is told


async def test_targets_that_name_a_host() -> None:
    async with gateway(Upstream()) as g:
        for target in (b"http://a/x?y", b"HTTP://a:80/x?y"):
            await g.raw(b"GET " + target + b" HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        await g.raw(b"OPTIONS * HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")

        assert [r.path for r in g.upstreams[0].requests] == ["/x?y", "/x?y", "*"]


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("/../secret", 400), ("/%2e%2e/secret", 400), ("/.%2E/secret", 400), ("/a/../../x", 400),
        ("/a/%2e%2e%2f../x", 400), ("/..%5csecret", 400), ("/..;a/x", 400), ("/a//../../x", 400),
        ("/..", 400), ("/./../x?a", 400), ("http://a/../x", 400),
        ("/a/../b", 200), ("/a..b/..c", 200), ("/x?/../../y", 200), ("/a/%2e%2e/b", 200),
    ],
)  # fmt: skip
async def test_no_path_leads_above_an_upstreams_own(target: str, status: int) -> None:
    async with Upstream() as upstream, gateway(upstream=(f"{upstream.url}/api",)) as g:
        sent = f"GET {target} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode()
        found = await g.raw(sent, closes=False)
        assert int(found[9:12]) == status
        paths = [f"/api{target}"] if status == 200 else []
        assert [one.path for one in upstream.requests] == paths

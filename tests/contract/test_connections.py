"""Connections to upstreams, and upstreams that come back."""

from __future__ import annotations

import asyncio

from codedinvnet.net.client import HttpClient, parse_origin
from tests.gateway.support import INFER, V2, gateway
from tests.net.test_server import Echo, serving
from tests.observing import until
from tests.upstream import Raw, answer, echo, saying


async def hasty(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer once a request's head is here, and read no body."""
    await reader.readuntil(b"\r\n\r\n")
    writer.write(answer(b"done"))
    await asyncio.sleep(60.0)


async def test_a_connection_whose_request_is_not_read_is_not_used_again() -> None:
    """The rest of the body would be taken for the next request."""
    async with Raw(hasty) as upstream:
        client = HttpClient(parse_origin(upstream.url))
        found = await client.ask("POST", "/", 10.0, bytes(64 << 20))
        assert (found.body, client.idle) == (b"done", 0)
        client.close()


async def test_an_upstream_that_came_back_is_ejected_by_its_first_failure() -> None:
    async with gateway(echo, echo) as g:
        first, _ = g.upstreams

        async def ask_until_ejected() -> None:
            while g.metric("upstream_up") == 2:
                assert (await g.ask("POST", V2, INFER)).body == INFER

        await first.stop()
        await ask_until_ejected()
        first.requests.clear()
        first.handler = saying(b"", 500)
        await first.start()
        await until(lambda: g.metric("upstream_up") == 2)
        await ask_until_ejected()
        assert len(first.requests) == 1


async def test_a_request_that_came_as_its_connection_is_closed_is_answered() -> None:
    async with serving(Echo()) as (served, connect):
        reader, writer = await connect()
        await until(lambda: bool(served.connections))
        (connection,) = served.connections
        writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        connection.close_if_idle()  # the event loop has not seen what is in the socket's buffer
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 OK\r\n")

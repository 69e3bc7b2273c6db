"""What upstreams and clients get of each other: bytes, fields, bodies, statuses."""

from __future__ import annotations

import asyncio
import gzip

import pytest

from tests.gateway.support import INFER, V2, gateway
from tests.upstream import Request, Upstream, answer


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "QUERY"])
@pytest.mark.parametrize("path", ["/", "/a/../b//c?x=%2F&y=a+b", "/v1/chat/completions", "/%C3%A9"])
async def test_any_request_is_forwarded_byte_for_byte(method: str, path: str) -> None:
    body = None if method in ("GET", "DELETE", "OPTIONS") else bytes(range(256))
    async with gateway(Upstream()) as g:
        found = await g.ask(method, path, body, X_Odd="A  b,c", accept="*/*")
        request = g.upstreams[0].requests[0]

        assert request.start == f"{method} {path} HTTP/1.1"
        assert request.body == (body or b"")
        assert b"X-Odd: A  b,c\r\naccept: */*\r\n" in request.head
        assert found.body == (body or path.encode())


@pytest.mark.parametrize(
    ("sent", "passed_on", "stays"),
    [  # what is passed on, and a part of what is not
        (b"X-A: 1\r\nX-A: 2\r\n", b"X-A: 1\r\nX-A: 2\r\n", None),
        (b"Connection: close, X-Own\r\nX-Own: 1\r\nX-Other: 2\r\n", b"X-Other: 2\r\n", b"X-Own"),
        (b"TE: trailers\r\nKeep-Alive: 5\r\nX-A: 1\r\n", b"X-A: 1\r\n", b"TE:"),
        (b"Proxy-Connection: x\r\nX-A: 1\r\n", b"X-A: 1\r\n", b"Proxy-Connection"),
        (b"Authorization: Bearer x\r\nCookie: a=b\r\n", b"Authorization: Bearer x\r\nCookie", None),
        (b"X-A: 1\r\nUpgrade: h2c\r\nHTTP2-Settings: x\r\n", b"X-A: 1\r\n", b"Upgrade"),
        (b"Accept-Encoding:gzip  \r\n", b"Accept-Encoding:gzip  \r\n", None),
        (b"Date: x\r\nServer: y\r\nVia: z\r\n", b"Date: x\r\nServer: y\r\nVia: z\r\n", None),
    ],
)
async def test_fields_in_both_directions(
    sent: bytes, passed_on: bytes, stays: bytes | None
) -> None:
    async def mirror(request: Request, writer: asyncio.StreamWriter) -> bytes:
        return answer(b"ok", fields=sent.decode())

    async with gateway(Upstream(mirror)) as g:
        found = await g.raw(b"GET / HTTP/1.1\r\nHost: a\r\n" + sent + b"Connection: close\r\n\r\n")
        head = g.upstreams[0].requests[0].head

    assert head.startswith(b"GET / HTTP/1.1\r\nHost: 127.0.0.1:")
    for message in (head, found):
        assert passed_on in message
        assert stays is None or stays not in message


async def test_an_answer_comes_back_as_it_is() -> None:
    packed = gzip.compress(b"x" * 1000)

    async def serve(request: Request, writer: asyncio.StreamWriter) -> bytes:
        return answer(packed, 299, "Content-Encoding: gzip\r\nX: \xe9\r\nSet-Cookie: a\r\n")

    async with gateway(Upstream(serve)) as g:
        found = await g.ask("POST", "/any", b"")

    assert (found.status, found.head.reason, found.body) == (299, b"Fine", packed)
    assert found.field("x") == "\xc3\xa9"
    assert found.field("codedinvnet-outcome") == ""


@pytest.mark.parametrize("status", [200, 204, 304, 404, 503, 599])
@pytest.mark.parametrize("request_line", ["GET /", "HEAD /", "POST /other", f"POST {V2}"])
async def test_statuses(status: int, request_line: str) -> None:
    """With one upstream there is nobody else to ask: its answer is the client's."""

    async def serve(request: Request, writer: asyncio.StreamWriter) -> bytes:
        if status in (204, 304) or request.start.startswith("HEAD"):
            return b"HTTP/1.1 %d Fine\r\nX: y\r\nContent-Length: 3\r\n\r\n" % status
        return answer(b"no?", status, "X: y\r\n")

    method, path = request_line.split(" ")
    async with gateway(Upstream(serve)) as g:
        for _ in range(2):  # on one connection
            found = await g.ask(method, path, INFER if method == "POST" else None)
            empty = status in (204, 304) or method == "HEAD"
            assert (found.status, found.field("x")) == (status, "y")
            assert found.body == (b"" if empty else b"no?")
            assert found.field("content-length") == ("" if status == 204 else "3")


@pytest.mark.parametrize(
    "said",
    [
        b"HTTP/1.1 600 What\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 999 What\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 1000 What\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
        b"what?\r\n\r\n",
        b"",
    ],
)
@pytest.mark.parametrize("path", ["/other", V2])
async def test_what_is_no_answer_is_502(said: bytes, path: str) -> None:
    async def serve(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(said)

    async with gateway(Upstream(serve)) as g:
        found = await g.ask("POST", path, INFER)

    assert found.status == 502
    assert b'"error"' in found.body


@pytest.mark.parametrize("trailers", ["", "X-Sum: 7\r\n"])
async def test_chunked_requests_and_trailers(trailers: str) -> None:
    chunked = b"5;ext=1\r\nhello\r\n6\r\n world\r\n0\r\n" + trailers.encode() + b"\r\n"
    fields = b"Host: a\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    async with gateway(Upstream()) as g:
        found = await g.raw(b"POST /any HTTP/1.1\r\n" + fields + chunked)
        request = g.upstreams[0].requests[0]

    assert request.body == b"hello world"
    assert found.endswith(b"hello world")
    assert request.fields.get("trailer-x-sum") == ("7" if trailers else None)
    assert ("content-length" in request.fields) is not bool(trailers)


async def test_trailers_of_an_answer() -> None:
    async def serve(request: Request, writer: asyncio.StreamWriter) -> bytes:
        head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n"
        return head + b"2\r\nok\r\n0\r\nX-Sum: 7\r\n\r\n"

    async with gateway(Upstream(serve)) as g:
        found = await g.raw(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")

    assert b"Transfer-Encoding: chunked" in found
    assert found.endswith(b"2\r\nok\r\n0\r\nX-Sum: 7\r\n\r\n")


SMUGGLED = (
    b"Authorization: Bearer stolen\r\nContent-Length: 7\r\nTransfer-Encoding: chunked\r\n"
    b"host: evil\r\nCookie: a\r\nSet-Cookie: a\r\nX-Forwarded-For: b\r\n"
    b"TE: x\r\nKeep-Alive: x\r\nContent-Type: text/html\r\n"
)


@pytest.mark.parametrize("sound", [b"", b"X-Sum: 7\r\n"])
async def test_no_trailer_says_what_only_a_header_may(sound: bytes) -> None:
    """Servers that join trailers to the header would obey them."""
    chunked = b"2\r\nok\r\n0\r\n" + SMUGGLED + sound + b"\r\n"

    async def serve(request: Request, writer: asyncio.StreamWriter) -> bytes:
        return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked

    async with gateway(Upstream(serve)) as g:
        head = b"POST /any HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n"
        found = await g.raw(head + b"Connection: close\r\n\r\n" + chunked)
        request = g.upstreams[0].requests[0]

    assert request.body == b"ok"
    trailers = {name for name in request.fields if name.startswith("trailer-")}
    assert trailers == ({"trailer-x-sum"} if sound else set())
    assert "authorization" not in request.fields
    assert not any(line in found for line in SMUGGLED.splitlines() if b"chunked" not in line)
    assert found.endswith(sound + b"\r\n")


async def test_an_upstreams_path_precedes_that_of_each_request() -> None:
    async with Upstream() as upstream, gateway(upstream=(f"{upstream.url}/base/",)) as g:
        assert (await g.ask("GET", "/x?y")).body == b"/base/x?y"


async def test_http_1_0_clients() -> None:
    async def serve(request: Request, writer: asyncio.StreamWriter) -> bytes:
        return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"

    async with gateway(Upstream(serve)) as g:
        found = await g.raw(b"GET / HTTP/1.0\r\n\r\n", closes=False)

    assert b"chunked" not in found
    assert found.endswith(b"\r\n\r\nok")


async def test_what_is_said_to_the_gateway_alone_is_not_passed_on() -> None:
    async with gateway(Upstream()) as g:
        await g.ask("GET", x_hedge="off")
        assert "x-hedge" not in g.upstreams[0].requests[0].fields

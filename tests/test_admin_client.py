"""What is asked of a running service goes to that service alone."""

from __future__ import annotations

import asyncio

import pytest

from codedinvnet.common.errors import UserError
from codedinvnet.net.admin_client import ask
from tests.upstream import Handler, Request, Upstream, answer


def saying(words: bytes) -> Handler:
    """Answer everybody so, and hang up."""

    async def serve(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(words)

    return serve


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (b"SSH-2.0\r\n\r\n", "this is not a service of codedinvnet (its answer is not HTTP/1.1"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{", "this is not a service of codedinvnet"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n{", "this is not a service of codedinvnet"),
        (b"HTTP/1.1 500 Oh\r\nContent-Length: 1\r\n\r\n{", "codedinvnet (status 500)"),
    ],
)
async def test_what_speaks_no_whole_http_is_told_in_one_line(words: bytes, told: str) -> None:
    async with Upstream(saying(words)) as service:
        with pytest.raises(UserError) as caught:
            await asyncio.to_thread(ask, service.url, "/policy")
    assert told in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
async def test_no_redirect_is_followed(code: int) -> None:
    """The token would go along."""

    async def redirect(request: Request, writer: asyncio.StreamWriter) -> bytes:
        return answer(b"", code, f"Location: {other.url}/there\r\n")

    async with Upstream() as other, Upstream(redirect) as service:
        told = f"{service.url}.*it redirects to {other.url}/there: give an address that leads there"
        for body in (None, {"policy": "hedge"}):
            with pytest.raises(UserError, match=told):
                await asyncio.to_thread(ask, service.url, "/policy", "secret", body)
    tokens = [request.fields["authorization"] for request in service.requests]
    assert tokens == ["Bearer secret"] * 2
    assert other.requests == []

from __future__ import annotations

import asyncio
import socket

import pytest

from codedinvnet.errors import UserError
from codedinvnet.serving.serve import bind


def test_connections_do_not_wait_for_acknowledgements() -> None:
    """With Nagle's algorithm on, every answer's body waits 40 ms for the client's one."""
    seen: list[int] = []

    async def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted = writer.get_extra_info("socket")
        seen.append(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    async def run() -> None:
        listener = bind("127.0.0.1", 0)
        async with await asyncio.start_server(accept, sock=listener):
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            assert await reader.read() == b""
            writer.close()

    asyncio.run(run())
    assert seen
    assert all(seen)


def test_a_taken_port_is_told() -> None:
    with bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1:{port}"):
            bind("127.0.0.1", port)

"""What is asked of a running service goes to that service alone."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from codedinvnet.common.errors import UserError
from codedinvnet.net.admin_client import ask


@contextmanager
def redirecting(to: str, code: int) -> Iterator[tuple[str, list[str]]]:
    """Yield the address of a server that redirects, and the tokens that it has got."""
    tokens: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            tokens.append(self.headers["Authorization"])
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(code)
            self.send_header("Location", to)
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", tokens
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def saying(words: bytes) -> Iterator[str]:
    """Yield the address of a program that answers everybody so, and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(2**16)
                connection.sendall(words)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        thread.join()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (b"SSH-2.0\r\n\r\n", "this is not a service of codedinvnet (its answer is not HTTP/1.1"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{", "this is not a service of codedinvnet"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n{", "this is not a service of codedinvnet"),
        (b"HTTP/1.1 500 Oh\r\nContent-Length: 1\r\n\r\n{", "codedinvnet (status 500)"),
    ],
)
def test_what_speaks_no_whole_http_is_told_in_one_line(words: bytes, told: str) -> None:
    with saying(words) as url, pytest.raises(UserError) as caught:
        ask(url, "/policy")
    assert told in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed(code: int) -> None:
    """The token would go along."""
    with (
        redirecting("http://127.0.0.1:1/", 302) as (other, others),
        redirecting(f"{other}/there", code) as (url, tokens),
    ):
        told = f"{url}.*it redirects to {other}/there: give an address that leads there itself"
        for body in (None, {"policy": "hedge"}):
            with pytest.raises(UserError, match=told):
                ask(url, "/policy", "secret", body)
    assert tokens == ["Bearer secret"] * 2
    assert others == []

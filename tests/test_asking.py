"""What is asked of a running service goes to that service alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from codedinvnet.asking import ask
from codedinvnet.errors import UserError
from codedinvnet.protect.capture import fetch


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
        with pytest.raises(UserError, match=told):
            fetch(url, "secret")
    assert tokens == ["Bearer secret"] * 3
    assert others == []

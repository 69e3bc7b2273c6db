"""What stands before every request: the names and the token that it needs, and a count."""

from __future__ import annotations

import hmac
import ipaddress
import re
from pathlib import Path

from prometheus_client import Counter
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from codedinvnet.serving.faces.v2 import short

LOOPBACK = ("127.0.0.1", "::1", "localhost")
ANY_ADDRESS = ("0.0.0.0", "::")
"""Hosts to listen on that mean every address of this machine."""


def is_open(host: str, token_file: Path | None) -> bool:
    """Tell whether others than this machine's reach the port, and need no token."""
    return token_file is None and host not in LOOPBACK


class HostCheck:
    """Let requests through whose Host header is known.

    A page of another site that has its name lead here (DNS rebinding) would be taken for ours by
    the browser, and read what the service shows; but the browser says by what name it came.
    """

    def __init__(self, app: ASGIApp, hosts: tuple[str, ...]) -> None:
        self.app = app
        self.names = {*LOOPBACK, *(host.lower().strip("[]") for host in hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] == "http":
            given = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
            for host in given:  # none: no browser
                if not self.known(host):
                    message = f"host {short(host)} is not known here; see --allowed-host"
                    await problem(421, message)(scope, receive, send)
                    return
        await self.app(scope, receive, send)

    def known(self, host: str) -> bool:
        """Tell whether a Host header, with or without a port, names this service."""
        name = re.sub(r":\d*$", "", host.lower())
        if name.startswith("[") and name.endswith("]"):
            name = name[1:-1]
        if name in self.names or "*" in self.names:
            return True
        if self.names.isdisjoint(ANY_ADDRESS):
            return False
        try:  # an address cannot be made to lead elsewhere
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


class TokenCheck:
    """Let requests through that carry the token; probes and the bare page need none."""

    OPEN = re.compile(r"/|/v2/health/(live|ready)|/v2/models/[^/]+(/versions/[^/]+)?/ready")
    """As over gRPC (`ServerLive`, `ServerReady`, `ModelReady`), and the page."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self.app = app
        self.expected = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] == "http" and not self.OPEN.fullmatch(scope["path"]):
            given = dict(scope["headers"]).get(b"authorization", b"")
            scheme, _, token = given.partition(b" ")
            right = hmac.compare_digest(token.strip(), self.expected)
            if scheme.lower() != b"bearer" or not right:
                message = "a bearer token is needed: Authorization: Bearer TOKEN"
                response = problem(401, message, {"WWW-Authenticate": "Bearer"})
                await response(scope, receive, send)
                return
        await self.app(scope, receive, send)


class RequestCount:
    """Count inference requests by the status code that they got."""

    def __init__(self, app: ASGIApp, counter: Counter) -> None:
        self.app, self.counter = app, counter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http" or not scope["path"].endswith("/infer"):
            await self.app(scope, receive, send)
            return

        started = False

        async def counted(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self.counter.labels(str(message["status"])).inc()
            await send(message)

        try:
            await self.app(scope, receive, counted)
        except Exception:  # which is answered by who called us
            if not started:
                self.counter.labels("500").inc()
            raise


def problem(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """Return an error response."""
    return JSONResponse({"error": message}, status_code=status, headers=headers)

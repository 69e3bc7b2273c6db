"""How a service or gateway listens: its socket, server and logs, until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import math
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager

import uvicorn
from starlette.applications import Starlette

from codedinvnet.collector import freeze_loaded, keep_freed
from codedinvnet.errors import UserError
from codedinvnet.models.base import DATATYPES
from codedinvnet.serving.background import Background
from codedinvnet.serving.faces import connections
from codedinvnet.serving.faces.connections import BoundedHttp, connection_limit
from codedinvnet.serving.faces.http import LARGE_BODY
from codedinvnet.serving.faces.tls import Certificate, follow
from codedinvnet.serving.faces.traced import TracedRequests
from codedinvnet.serving.faces.v2 import TEXT_LENGTH, json_bytes
from codedinvnet.serving.frontend import FrontEnd
from codedinvnet.serving.logs import JsonLines, logger
from codedinvnet.serving.served import Served
from codedinvnet.serving.tracing import exporting

DRAIN_TIMEOUT = 10
"""Seconds that a stopping server waits for open requests beyond their deadline."""
VALUE_LENGTH = 4
"""Bytes of a number in a binary tensor, at least as many as images have as floats."""
KEEP_ALIVE = 75
"""Seconds that an idle connection stays open."""


def body_limit(served: Served, max_batch: int, memory: int) -> int:
    """Return how many bytes a request may have that has so many queries at most."""
    query = sum(
        math.prod(spec.shape) * max(VALUE_LENGTH, DATATYPES[spec.datatype].itemsize)
        if spec.datatype != "BYTES"
        else math.prod(spec.shape) * TEXT_LENGTH
        for spec in served.signature.inputs
    )
    return min(max(max_batch * query, json_bytes(served)) + LARGE_BODY, memory)


def check_limit(limit: float | None) -> None:
    """Refuse a limit on disagreement that is no share.

    Raises:
        UserError: naming the option.
    """
    if limit is not None and not 0 < limit < 1:
        raise UserError(f"--max-disagreement: must lie between 0 and 1, got {limit}")


def check_ports(port: int, grpc_port: int | None) -> None:
    """Refuse ports that are none.

    Raises:
        UserError: naming the option.
    """
    for flag, value in (("--port", port), ("--grpc-port", grpc_port)):
        if value is not None and not 0 <= value <= 65535:
            raise UserError(f"{flag}: must lie in 0..65535, got {value}")


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Raises:
        UserError: if the address is taken or not ours.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, the event loop knows that it is TCP and switches Nagle's algorithm
    # off: otherwise a response's body waits for the client's delayed acknowledgement, 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Its connections inherit it: clients that are gone without a word are found out.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":  # so are those that read nothing: closing waits for them otherwise
        milliseconds = round(1000 * connections.UNREAD)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
    try:
        listener.bind((host, port))
        listener.listen()  # now, since two that only bind do not notice each other
    except (OSError, UnicodeError) as error:  # the latter of what can be no host's name
        listener.close()
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen on {host}:{port}: {reason}") from error
    return listener


def log_to_stderr() -> None:
    """Write the service's events as JSON lines to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    # uvicorn's warnings are of what clients send, a line for each request.
    levels = {logger.name: logging.INFO, "uvicorn": logging.ERROR, "asyncio": logging.WARNING}
    levels["opentelemetry"] = logging.ERROR
    for name, level in levels.items():
        chosen = logging.getLogger(name)
        chosen.handlers = [handler]
        chosen.setLevel(level)
        chosen.propagate = False


def server_config(
    app: Starlette,
    deadline_ms: float,
    most: int,
    certificate: Certificate | None = None,
) -> uvicorn.Config:
    """Return how an application is served, on so many connections at most."""
    return uvicorn.Config(
        app,
        http=type("Http", (BoundedHttp,), {"most": most}),
        ws="none",
        log_config=None,
        access_log=False,
        proxy_headers=False,  # nobody here asks where a request comes from
        timeout_graceful_shutdown=math.ceil(deadline_ms / 1000) + DRAIN_TIMEOUT,
        timeout_keep_alive=KEEP_ALIVE,
        ssl_certfile=None if certificate is None else certificate.chain,
        ssl_keyfile=None if certificate is None else certificate.key,
    )


class Server(uvicorn.Server):
    """A server that tells when it is up, stops with its service, and leaves signals to its caller.

    Args:
        config: see `server_config`.
        leaves: tells whether the service is about to stop.
    """

    def __init__(self, config: uvicorn.Config, leaves: Callable[[], bool]) -> None:
        super().__init__(config)
        self.leaves, self.up = leaves, asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen; over TLS a handshake may take as long as a request's headers."""
        context = self.config.ssl
        await super().startup(sockets if context is None else [])
        if context is not None:
            loop = asyncio.get_running_loop()
            for listener in sockets or ():
                server = await loop.create_server(
                    self._connection,
                    sock=listener,
                    ssl=context,
                    ssl_handshake_timeout=connections.HEAD_TIMEOUT,
                    backlog=self.config.backlog,
                )
                self.servers.append(server)
        self.up.set()

    def _connection(self) -> asyncio.Protocol:
        kind: Callable[..., asyncio.Protocol] = self.config.http_protocol_class
        return kind(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )

    async def on_tick(self, counter: int) -> bool:
        """Return whether to stop: when told, or as soon as requests over gRPC are waited for."""
        return await super().on_tick(counter) or self.leaves()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def listening(
    app: Starlette,
    host: str,
    port: int,
    deadline_ms: float,
    front: FrontEnd,
    certificate: Certificate | None = None,
) -> AsyncIterator[str]:
    """Serve an application while the body runs, and stop its front end; yields the address.

    Raises:
        UserError: if it cannot.
    """
    listener = bind(host, port)
    try:
        most = connection_limit(front.rules.workers, front.rules.slots)
        config = server_config(app, deadline_ms, most, certificate)
        server = Server(config, lambda: front.announced)
        task = asyncio.create_task(server.serve(sockets=[listener]))
        up = asyncio.create_task(server.up.wait())
        background = Background()
        try:
            await asyncio.wait({task, up}, return_when=asyncio.FIRST_COMPLETED)
            if not up.done():
                raise UserError(f"the server on {host}:{port} ended while starting")
            if certificate is not None and config.ssl is not None:
                background.spawn(follow(certificate, config.ssl, "HTTP"))
            name, number = listener.getsockname()[:2]
            scheme = "http" if certificate is None else "https"
            yield f"{scheme}://[{name}]:{number}" if ":" in name else f"{scheme}://{name}:{number}"
        finally:
            up.cancel()
            await background.stop()
            server.should_exit = True
            await task
    finally:
        await front.stop()
        listener.close()


@asynccontextmanager
async def tracing_of(front: FrontEnd, app: Starlette, collector: str | None) -> AsyncIterator[None]:
    """Send a service's traces to a collector while the body runs, if there is one.

    Raises:
        UserError: see `exporting`.
    """
    async with exporting(collector) as tracing:
        if tracing is not None:
            front.waiting.tracing = tracing
            app.add_middleware(TracedRequests, tracing=tracing)
        yield


async def until_told(
    serving: AbstractAsyncContextManager[tuple[str, FrontEnd]], line: Callable[[str, FrontEnd], str]
) -> None:
    """Serve until SIGTERM, Ctrl-C, or SIGHUP, unless that is ignored (`nohup`).

    Args:
        serving: yields the address and the front end.
        line: what is printed once it serves.
    """
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    starting = asyncio.current_task()

    def told() -> None:
        if starting is not None:
            starting.cancel()
        else:
            stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        loop.add_signal_handler(signal.SIGHUP, told)
    async with serving as (address, front):
        starting = None
        freeze_loaded()
        keep_freed()
        print(f"{line(address, front)} (Ctrl-C or SIGTERM drains and stops)", flush=True)
        await stop.wait()
        front.announce_draining()  # connections are waited for first, and may take their time
        # A second Ctrl-C ends at once. A second SIGTERM does not: timeout(1) sends one to the
        # process and one to its group.
        loop.remove_signal_handler(signal.SIGINT)

"""`codedinvnet gateway`: put upstreams, front end and faces together, and run them."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import uvloop

from codedinvnet.asking import read_token
from codedinvnet.errors import UserError
from codedinvnet.serving.bodies import BodyMemory
from codedinvnet.serving.faces.middleware import LOOPBACK
from codedinvnet.serving.faces.tls import read_certificate
from codedinvnet.serving.faces.traced import traced
from codedinvnet.serving.frontend import FrontEnd
from codedinvnet.serving.gateway.discovery import Discovery, follow
from codedinvnet.serving.gateway.http_face import build_gateway_app
from codedinvnet.serving.gateway.options import GatewayOptions, check, read_roots
from codedinvnet.serving.gateway.pool import UpstreamPool
from codedinvnet.serving.gateway.relay import PassThrough, Relay
from codedinvnet.serving.gateway.upstreams import Upstream, open_upstream
from codedinvnet.serving.metrics import Metrics, log_event
from codedinvnet.serving.rules.settings import POLICIES, Rules, hang_limit, pending_limit
from codedinvnet.serving.serve import listening, log_to_stderr, tracing_of, until_told

MIB = 2**20
PLACES = 32
"""Upstreams that there may be, at least, if they come and go."""


def make_relay(
    options: GatewayOptions, upstreams: Sequence[Upstream], places: int | None = None
) -> Relay:
    """Return the relay, not yet started.

    Args:
        options: checked.
        upstreams: those of now.
        places: see `UpstreamPool`.

    Raises:
        UserError: if the options do not fit each other.
    """
    metrics = Metrics()
    hang = options.hang_timeout_ms or hang_limit(options.deadline_ms)
    pool = UpstreamPool(
        upstreams,
        options.name,
        hang / 1000,
        metrics.registry,
        cancels=options.cancel,
        places=places,
    )
    rules = Rules(
        workers=len(pool.places),
        policy=POLICIES[options.policy],
        hang_timeout=2 * options.deadline_ms / 1000,  # the pool finds them out, call by call
        max_pending=options.max_pending or pending_limit(len(pool.places) * options.slots),
        routing=options.routing,
        slots=options.slots,
    )
    try:
        front = FrontEnd(
            PassThrough(options.name),
            pool,
            rules,
            deadline=options.deadline_ms / 1000,
            down_timeout=options.down_timeout_ms / 1000,
            metrics=metrics,
        )
    except ValueError as error:
        raise UserError(f"--upstream: {error}") from error
    return Relay(front, pool)


@asynccontextmanager
async def running(options: GatewayOptions) -> AsyncIterator[tuple[str, Relay, int | None]]:
    """Run the gateway while the body runs; yields its address, itself and the port of gRPC.

    Raises:
        UserError: if the options, or the upstreams, cannot work.
    """
    check(options)
    token, roots = read_token(options.token_file), read_roots(options.upstream_ca)
    certificate = read_certificate(options.tls_cert, options.tls_key)
    open_one = functools.partial(open_upstream, roots=roots)
    discovery = Discovery(options.upstream, options.upstreams_file)
    upstreams = [open_one(url) for url in await discovery.urls()]
    places = max(PLACES, len(upstreams)) if discovery.changes else None
    relay = make_relay(options, upstreams, places)
    memory = BodyMemory(int(options.max_body_memory * MIB), relay.front.refuse)
    app = build_gateway_app(
        relay,
        memory,
        token=token,
        hosts=(options.host, *options.allowed_host),
        guarded=bool(token) or options.host in LOOPBACK,
    )
    deadline = options.deadline_ms
    async with (
        tracing_of(relay.front, app, options.traces),
        listening(app, options.host, options.port, deadline, relay.front, certificate) as address,
        AsyncExitStack() as stack,
    ):
        port = None
        if options.grpc_port is not None:
            from codedinvnet.serving.faces.grpc import GrpcFace
            from codedinvnet.serving.gateway.grpc_backend import RelayBackend

            face = GrpcFace(
                traced(RelayBackend(relay), relay.front.waiting.tracing), memory, token=token
            )
            grace = options.deadline_ms / 1000
            port = await stack.enter_async_context(
                face.listening(options.host, options.grpc_port, grace, certificate)
            )
        await relay.front.start()
        if discovery.changes:
            following = asyncio.create_task(follow(discovery, relay.pool, open_one))
            stack.callback(following.cancel)
        yield address, relay, port


async def _run(options: GatewayOptions) -> None:
    if options.token_file is None and options.host not in LOOPBACK:
        why = "whoever reaches the port may send requests"
        log_event("no token", logging.WARNING, host=options.host, reason=why)
    about = ""

    @asynccontextmanager
    async def serving() -> AsyncIterator[tuple[str, FrontEnd]]:
        nonlocal about
        async with running(options) as (address, relay, port):
            count = sum(place.is_filled for place in relay.pool.places)
            about = "" if port is None else f" and gRPC port {port}"
            about += f": {count} upstream{'' if count == 1 else 's'}"
            yield address, relay.front

    def line(address: str, _: FrontEnd) -> str:
        how = f"{options.slots} slots each, policy {options.policy}"
        return f"gateway of {options.name} on {address}{about}, {how}"

    await until_told(serving(), line)


def run_gateway(options: GatewayOptions) -> None:
    """Run the gateway until SIGTERM or Ctrl-C, then drain and stop."""
    log_to_stderr()
    with contextlib.suppress(asyncio.CancelledError):  # told to stop before it was up
        uvloop.run(_run(options))

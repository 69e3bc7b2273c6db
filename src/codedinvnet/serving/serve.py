"""`codedinvnet serve`: put bundle, workers, front end and HTTP together, and run them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager

import torch
import uvicorn
import uvloop
from starlette.applications import Starlette

from codedinvnet.asking import read_token
from codedinvnet.codes.rules import is_systematic
from codedinvnet.data import SAMPLES, sample_images
from codedinvnet.errors import UserError
from codedinvnet.models.base import DATATYPES
from codedinvnet.serving.bodies import BodyMemory
from codedinvnet.serving.capture import Capture
from codedinvnet.serving.faces.connections import BoundedHttp, connection_limit
from codedinvnet.serving.faces.http import LARGE_BODY, AppOptions, build_app
from codedinvnet.serving.faces.page import demo_requests
from codedinvnet.serving.faces.tls import Certificate
from codedinvnet.serving.faces.traced import TracedRequests, traced
from codedinvnet.serving.faces.v2 import TEXT_LENGTH, json_bytes
from codedinvnet.serving.frontend import FrontEnd
from codedinvnet.serving.logs import JsonLines, log_event, logger
from codedinvnet.serving.opening import Opened, make_pool, open_served
from codedinvnet.serving.options import (
    ServeOptions,
    check,
    hang_timeout,
    is_open,
    policy_of,
    told_apart,
)
from codedinvnet.serving.policies import objection
from codedinvnet.serving.reliance import Reliance
from codedinvnet.serving.rules.settings import CODED, POLICIES, Rules, pending_limit
from codedinvnet.serving.served import Classifier, Served
from codedinvnet.serving.service import Service
from codedinvnet.serving.tracing import exporting
from codedinvnet.serving.workers.computing import freeze_loaded
from codedinvnet.serving.workers.faults import FaultyPool, check_per_request

DRAIN_TIMEOUT = 10
"""Seconds that a stopping server waits for open requests beyond their deadline."""
VALUE_LENGTH = 4
"""Bytes of a number in a binary tensor, at least as many as images have as floats."""
KEEP_ALIVE = 75
"""Seconds that an idle connection stays open."""
DEMO_IMAGES = 100


def make_service(options: ServeOptions) -> Service:
    """Return the service, not yet started.

    Raises:
        UserError: if the options do not fit the model or each other.
    """
    options = told_apart(options)
    opened = open_served(options)
    scheme, policy = opened.scheme, POLICIES[policy_of(options)]
    if options.policy is None and scheme is not None and not is_systematic(scheme.rules):
        policy = CODED  # of a protection, which says itself what its method is
    if why := objection(policy, scheme):
        raise UserError(f"--policy: {why}")
    workers = options.workers or opened.workers
    most = options.max_pending or pending_limit(workers)
    if options.max_batch > most:
        raise UserError(
            f"--max-batch: a request of {options.max_batch} queries could never be taken with "
            f"--max-pending {most}"
        )
    rules = Rules(
        workers=workers,
        policy=policy,
        group_timeout=options.group_timeout_ms / 1000,
        hang_timeout=hang_timeout(options),
        hedge_share=1 / options.k,
        extra=options.extra,
        max_pending=most,
        routing=options.routing,
    )
    pool = make_pool(options, opened.spec)
    if isinstance(pool, FaultyPool) and scheme is not None and not is_systematic(scheme.rules):
        check_per_request(pool.faults, scheme.name)
    try:
        front = FrontEnd(
            opened.served,
            pool,
            rules,
            scheme,
            opened.computer,
            deadline=options.deadline_ms / 1000,
            min_confidence=options.min_confidence,
            down_timeout=options.down_timeout_ms / 1000,
            reliance=reliance_of(options, opened, workers),
        )
    except ValueError as error:
        raise UserError(f"--workers: {error}") from error
    count = options.capture
    capture = None if count is None else Capture(opened.served.signature, count)
    return Service(front, opened.served, opened.known, capture=capture)


def reliance_of(options: ServeOptions, opened: Opened, workers: int) -> Reliance | None:
    """Return what the service relies on; None without a calibration for the method.

    Raises:
        UserError: if a limit on disagreement is asked for that could not be kept.
    """
    scheme, calibration, limit = opened.scheme, opened.calibration, options.max_disagreement
    if scheme is None or calibration is None:
        return None
    k = scheme.rules.k
    if calibration.curve(scheme.name, k) is None:
        if limit is not None:
            raise UserError(
                f"--max-disagreement: {options.protection or options.source} is not calibrated for "
                f"{scheme.name} with k = {k}"
            )
        return None
    return Reliance(calibration, scheme.name, k, workers, limit, options.on_corruption)


def app_options(options: ServeOptions, served: Served) -> AppOptions:
    """Return what the HTTP face goes by.

    Raises:
        UserError: if there is to be a token, and there is none.
    """
    requests = None
    if options.demo:
        images = None
        if isinstance(served, Classifier) and served.dataset in SAMPLES:
            images = sample_images(served.dataset).batch(torch.arange(DEMO_IMAGES))[0].numpy()
        requests = demo_requests(served, images)
    memory = int(options.max_body_memory * 2**20)
    return AppOptions(
        max_batch=options.max_batch,
        max_body=body_limit(served, options.max_batch, memory),
        body_memory=memory,
        token=read_token(options.token_file),
        demo=requests,
        hosts=(options.host, *options.allowed_host),
        guarded=not is_open(options),
    )


def body_limit(served: Served, max_batch: int, memory: int) -> int:
    """Return how many bytes a request may have that has so many queries at most."""
    query = sum(
        math.prod(spec.shape) * max(VALUE_LENGTH, DATATYPES[spec.datatype].itemsize)
        if spec.datatype != "BYTES"
        else math.prod(spec.shape) * TEXT_LENGTH
        for spec in served.signature.inputs
    )
    return min(max(max_batch * query, json_bytes(served)) + LARGE_BODY, memory)


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
    try:
        listener.bind((host, port))
        listener.listen()  # now, since two that only bind do not notice each other
    except OSError as error:
        listener.close()
        raise UserError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
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
    app: Starlette, deadline_ms: float, workers: int, certificate: Certificate | None = None
) -> uvicorn.Config:
    """Return how an application is served, before so many workers."""
    return uvicorn.Config(
        app,
        http=type("Http", (BoundedHttp,), {"most": connection_limit(workers)}),
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
    """A server that tells when it is up, and leaves signals to its caller."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.up.set()

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
        server = Server(server_config(app, deadline_ms, front.rules.workers, certificate))
        task = asyncio.create_task(server.serve(sockets=[listener]))
        up = asyncio.create_task(server.up.wait())
        try:
            await asyncio.wait({task, up}, return_when=asyncio.FIRST_COMPLETED)
            if not up.done():
                raise UserError(f"the server on {host}:{port} ended while starting")
            name, number = listener.getsockname()[:2]
            scheme = "http" if certificate is None else "https"
            yield f"{scheme}://[{name}]:{number}" if ":" in name else f"{scheme}://{name}:{number}"
        finally:
            up.cancel()
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


@asynccontextmanager
async def running(options: ServeOptions) -> AsyncIterator[tuple[str, Service]]:
    """Serve while the body runs, then drain and stop; yields the address and the service.

    Raises:
        UserError: if the options cannot work.
    """
    options = told_apart(options)
    check(options)
    read_token(options.token_file)  # or it is refused now
    service = make_service(options)
    torch.set_num_threads(1)  # heads are small, and the workers need the cores
    shown = app_options(options, service.served)
    app = build_app(service, shown, starts=False)
    address = (options.host, options.port)
    async with (
        tracing_of(service.front, app, options.traces),
        listening(app, *address, options.deadline_ms, service.front) as url,
        grpc_listening(options, service, shown),
    ):
        await service.front.start()  # now that it answers that it is alive, and not ready
        yield url, service


@asynccontextmanager
async def grpc_listening(
    options: ServeOptions, service: Service, shown: AppOptions
) -> AsyncIterator[None]:
    """Serve over gRPC as well while the body runs, if that is asked for."""
    if options.grpc_port is None:
        yield
        return
    from codedinvnet.serving.faces.grpc import GrpcFace
    from codedinvnet.serving.service_grpc import ServiceBackend

    face = GrpcFace(
        traced(ServiceBackend(service, shown.max_batch), service.front.waiting.tracing),
        BodyMemory(shown.body_memory, service.front.refuse),
        token=shown.token,
        max_message=shown.max_body,
    )
    async with face.listening(options.host, options.grpc_port, options.deadline_ms / 1000):
        yield


async def until_told(
    serving: AbstractAsyncContextManager[tuple[str, FrontEnd]], line: Callable[[str, FrontEnd], str]
) -> None:
    """Serve until SIGTERM or Ctrl-C.

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
    async with serving as (address, front):
        starting = None
        freeze_loaded()
        print(f"{line(address, front)} (Ctrl-C or SIGTERM drains and stops)", flush=True)
        await stop.wait()
        front.announce_draining()  # connections are waited for first, and may take their time
        # A second Ctrl-C ends at once. A second SIGTERM does not: timeout(1) sends one to the
        # process and one to its group.
        loop.remove_signal_handler(signal.SIGINT)


async def _serve(options: ServeOptions) -> None:
    if is_open(options):
        open_to = "whoever reaches the port may send queries, and sees the last ones' images"
        if options.demo:
            open_to += " and stops workers"
        log_event("no token", logging.WARNING, host=options.host, reason=open_to)

    @asynccontextmanager
    async def serving() -> AsyncIterator[tuple[str, FrontEnd]]:
        async with running(options) as (address, service):
            yield address, service.front

    def line(address: str, front: FrontEnd) -> str:
        rules = front.rules
        return (
            f"serving {options.source} on {address}: {rules.workers} workers, policy "
            f"{rules.policy.name}, k = {options.k}"
        )

    await until_told(serving(), line)


def serve(options: ServeOptions) -> None:
    """Serve until SIGTERM or Ctrl-C, then drain and stop."""
    log_to_stderr()
    with contextlib.suppress(asyncio.CancelledError):  # told to stop before it was up
        uvloop.run(_serve(options))

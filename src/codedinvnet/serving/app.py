"""`codedinvnet serve`: put model, workers, dispatcher and APIs together, and run them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import numpy as np
import torch
import uvloop

from codedinvnet.codes.base import Scheme
from codedinvnet.data import SAMPLES, sample_images
from codedinvnet.net.background import Background
from codedinvnet.net.collector import freeze_loaded, keep_freed
from codedinvnet.net.guard import Guard, Token
from codedinvnet.net.listening import allow_files, bind, log_to_stderr, stop_signals
from codedinvnet.net.logs import log_event
from codedinvnet.net.server import HttpServer
from codedinvnet.net.tls import Certificate, read_certificate
from codedinvnet.net.tracing import NOISY, exporting
from codedinvnet.scheduler.policies import POLICIES, Policy
from codedinvnet.scheduler.settings import Rules, pending_limit
from codedinvnet.serving.api.bodies import BodyMemory
from codedinvnet.serving.api.http import HttpApi
from codedinvnet.serving.api.page import demo_requests, page_routes
from codedinvnet.serving.choices import Choices, objection
from codedinvnet.serving.config import ServeOptions
from codedinvnet.serving.decoding import Decoder
from codedinvnet.serving.dispatch import Dispatcher, Timing
from codedinvnet.serving.gate import gate_of, unnoticed
from codedinvnet.serving.metrics import Metrics
from codedinvnet.serving.opened import Opened, check, make_pool, open_served, split_policy
from codedinvnet.serving.served import Classifier, Served, TensorCodec
from codedinvnet.serving.service import InferenceService
from codedinvnet.serving.tracing import Tracing

DEMO_IMAGES = 100
DRAIN_TIMEOUT = 10
"""Seconds that a stopping server waits for open requests beyond their deadline."""


@dataclass(frozen=True)
class App:
    """A service and what it is served by, not yet started."""

    options: ServeOptions
    service: InferenceService
    choices: Choices
    guard: Guard
    memory: BodyMemory
    """Bounds what requests hold, over HTTP and gRPC together."""
    certificate: Certificate | None

    @property
    def dispatcher(self) -> Dispatcher:
        """What answers queries."""
        return self.service.dispatcher

    def http(self) -> HttpApi:
        """Return the HTTP API."""
        served, demo = self.service.served, None
        if self.options.demo:
            demo = demo_requests(served, demo_images(served))
        routes = page_routes(self.service, demo)
        return HttpApi(self.service, self.memory, self.choices, self.guard, routes)


def demo_images(served: Served) -> np.ndarray | None:
    """Return images for the page's buttons, if there are some of the served kind."""
    if not isinstance(served, Classifier) or served.dataset not in SAMPLES:
        return None
    images = sample_images(served.dataset).batch(torch.arange(DEMO_IMAGES))[0]
    return np.asarray(images)


def open_app(options: ServeOptions) -> App:
    """Return the app of options that can work.

    The number of PyTorch's threads is set for this whole process.

    Raises:
        UserError: if the options cannot work.
    """
    check(options)
    options = split_policy(options)
    token = Token(options.token_file)
    certificate = read_certificate(options.tls_cert, options.tls_key)
    opened = open_served(options)
    policy = POLICIES[options.policy_name]
    scheme = opened.scheme
    if why := objection(policy, scheme):
        raise options.refuse("policy", why)
    rules = rules_of(options, opened, policy)
    metrics = Metrics()
    served, decoder = opened.served, None
    gate = None
    if scheme is not None:
        decoder = Decoder(scheme, served, metrics)
        whose = str(options.protection or options.source)
        gate = gate_of(
            opened.calibration,
            scheme.name,
            scheme.rules,
            rules.workers,
            opened.limit if options.max_disagreement is None else options.max_disagreement,
            whose if options.part is None else f"{whose} with {options.part}",
            options.on_corruption,
        )
    why = unnoticed(scheme, policy, gate)
    if why and options.on_corruption == "replace":
        raise options.refuse("on_corruption", f"wrong workers are not noticed: {why}")
    if why and scheme is not None and policy.takes_code:  # elsewhere it is not expected
        log_event("wrong workers are not noticed", reason=why)
    pool = make_pool(options, opened)
    timing = Timing(options.deadline_ms / 1000, options.down_timeout_ms / 1000)
    codec = TensorCodec(served, scheme, opened.computer)
    try:
        dispatcher = Dispatcher(pool, rules, codec, decoder, timing, gate, metrics)
    except ValueError as error:
        raise options.refuse("workers", str(error)) from error
    memory = int(options.max_body_memory * 2**20)
    service = InferenceService(dispatcher, served, options.max_batch, memory)
    torch.set_num_threads(1)  # heads are small, and the workers need the cores
    guard = Guard((options.host, *options.allow_host), token, not options.is_open)
    held = BodyMemory(memory, dispatcher)
    return App(options, service, Choices(scheme, rules.workers), guard, held, certificate)


def rules_of(options: ServeOptions, opened: Opened, policy: Policy) -> Rules:
    """Return what the scheduler goes by.

    Raises:
        UserError: if the options do not fit the model or each other.
    """
    workers = options.workers or opened.workers
    most = options.max_pending or pending_limit(workers)
    if options.max_batch > most:
        why = f"a request of {options.max_batch} queries could never be taken with max-pending"
        raise options.refuse("max_batch", f"{why} {most}")
    limit = opened.served.signature.max_batch
    if limit is not None and options.worker_batch > limit:
        raise options.refuse("worker_batch", f"the model takes {limit} at once at most")
    scheme: Scheme | None = opened.scheme
    return Rules(
        workers=workers,
        policy=policy,
        group_timeout=options.group_timeout_ms / 1000,
        hang_timeout=options.hang_timeout,
        hedge_share=1 / (options.members if scheme is None else scheme.rules.k),
        extra=options.extra,
        max_pending=most,
        worker_batch=options.worker_batch,
    )


# Listening


@asynccontextmanager
async def listening(app: App, api: HttpApi) -> AsyncIterator[str]:
    """Serve over HTTP while the body runs, and stop the dispatcher; yields the address.

    Raises:
        UserError: if the address is taken or not ours.
    """
    options, deadline = app.options, app.dispatcher.timing.deadline
    listener = bind(options.host, options.port)
    server = HttpServer(api, api.memory, allow_files(), deadline)
    app.dispatcher.drains.append(server.close)
    background = Background()
    background.spawn(app.guard.token.follow())
    try:
        yield await server.listen(listener, app.certificate)
    finally:
        await background.stop()
        await server.stop(deadline + DRAIN_TIMEOUT)
        await app.dispatcher.stop()
        listener.close()


@asynccontextmanager
async def running(options: ServeOptions, app: App | None = None) -> AsyncIterator[tuple[str, App]]:
    """Serve while the body runs, then drain and stop; yields the address and the app.

    Raises:
        UserError: if the options cannot work.
    """
    app = app or open_app(options)
    options, api = app.options, app.http()
    async with exporting() as tracer:
        tracing = None if tracer is None else Tracing(tracer)
        app.dispatcher.calls.tracing = api.tracing = tracing
        async with listening(app, api) as url, grpc_listening(app, api):
            await app.dispatcher.start()  # now that it answers that it is alive, and not ready
            yield url, app


@asynccontextmanager
async def grpc_listening(app: App, api: HttpApi) -> AsyncIterator[None]:
    """Serve over gRPC as well while the body runs, if the options say so."""
    options = app.options
    if options.grpc_port is None:
        yield
        return
    from codedinvnet.serving.api.grpc import GrpcApi

    served = GrpcApi(app.service, app.memory, app.guard, api.tracing)
    async with served.listening(options.host, options.grpc_port, app.certificate):
        yield


# The command


def warn_open(options: ServeOptions) -> None:
    """Log what others may do who reach the port and need no token."""
    if options.is_open:
        why = "any client that reaches the port may send queries"
        why += " and stop workers" if options.demo else ""
        log_event("no token", logging.WARNING, host=options.host, reason=why)


async def _serve(options: ServeOptions, app: App) -> None:
    """Serve until a signal; see `stop_signals`."""
    warn_open(options)
    stop = stop_signals(
        lambda: log_event("reload", reason="tokens and certificates are read again every second")
    )
    up = False

    async def run() -> None:
        nonlocal up
        async with running(options, app) as (address, _):
            up = True
            freeze_loaded()
            keep_freed()
            rules, choices = app.dispatcher.rules, app.choices
            size = "" if choices.method is None else f", k = {choices.size}"
            print(
                f"serving {options.source} on {address}: {rules.workers} workers, policy "
                f"{rules.policy.name}{size} (Ctrl-C or SIGTERM drains and stops)",
                flush=True,
            )
            await stop.wait()
            app.dispatcher.announce_draining()  # closing the connections first takes a while

    running_task, stopped = asyncio.ensure_future(run()), asyncio.ensure_future(stop.wait())
    await asyncio.wait({running_task, stopped}, return_when=asyncio.FIRST_COMPLETED)
    if not up:  # asked to stop before it was up, or it cannot start
        running_task.cancel()
    stopped.cancel()
    await running_task


def serve(options: ServeOptions) -> None:
    """Serve until SIGTERM or Ctrl-C, then drain and stop."""
    stop_logging = log_to_stderr(*NOISY)
    try:
        try:
            # Before the event loop has the signals: it would see none while the model is loaded.
            app = open_app(options)
        except KeyboardInterrupt:  # asked to stop before it was up
            return
        with contextlib.suppress(asyncio.CancelledError):  # likewise
            uvloop.run(_serve(options, app))
    finally:
        stop_logging()

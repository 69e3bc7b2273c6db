"""`codedinvnet serve`: put bundle, workers, front end and HTTP together, and run them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import torch
import uvloop

from codedinvnet.asking import read_token
from codedinvnet.codes.rules import is_systematic
from codedinvnet.data import SAMPLES, sample_images
from codedinvnet.errors import UserError
from codedinvnet.scheduler.policies import CODED, POLICIES
from codedinvnet.scheduler.settings import Rules, pending_limit
from codedinvnet.serving.bodies import BodyMemory
from codedinvnet.serving.choices import objection
from codedinvnet.serving.faces.connections import allow_files
from codedinvnet.serving.faces.http import AppOptions, build_app
from codedinvnet.serving.faces.middleware import is_open
from codedinvnet.serving.faces.page import demo_requests
from codedinvnet.serving.faces.traced import traced
from codedinvnet.serving.frontend import FrontEnd
from codedinvnet.serving.listening import (
    body_limit,
    listening,
    log_to_stderr,
    tracing_of,
    until_told,
)
from codedinvnet.serving.logs import log_event
from codedinvnet.serving.opening import make_pool, open_served
from codedinvnet.serving.options import (
    ServeOptions,
    check,
    hang_timeout,
    policy_of,
    tell_open,
    told_apart,
)
from codedinvnet.serving.reliance import REPLACE, reliance_of, unnoticed
from codedinvnet.serving.served import Classifier, Served
from codedinvnet.serving.service import Service
from codedinvnet.serving.workers.faults import FaultyPool, check_per_request

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
    limit = opened.served.signature.max_batch
    if limit is not None and options.worker_batch > limit:
        raise UserError(f"--worker-batch: the model takes {limit} at once at most")
    rules = Rules(
        workers=workers,
        policy=policy,
        group_timeout=options.group_timeout_ms / 1000,
        hang_timeout=hang_timeout(options),
        hedge_share=1 / (options.members if scheme is None else scheme.rules.k),
        extra=options.extra,
        max_pending=most,
        worker_batch=options.worker_batch,
    )
    relied = None
    if scheme is not None:
        whose = str(options.protection or options.source)
        relied = reliance_of(
            opened.calibration,
            scheme.name,
            scheme.rules,
            workers,
            options.max_disagreement,
            whose if options.part is None else f"{whose} with {options.part}",
            options.on_corruption,
        )
    why = unnoticed(scheme, policy, relied)
    if why and options.on_corruption == REPLACE:
        raise UserError(f"--on-corruption replace: wrong workers are not noticed: {why}")
    if why and scheme is not None and policy.takes_code:  # elsewhere nobody expects it
        log_event("wrong workers are not noticed", reason=why)
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
            reliance=relied,
        )
    except ValueError as error:
        raise UserError(f"--workers: {error}") from error
    return Service(front, opened.served)


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
        guarded=not is_open(options.host, options.token_file),
    )


def open_service(options: ServeOptions) -> Service:
    """Return the service of options that can work, not yet started.

    The number of PyTorch's threads is set for this whole process.

    Raises:
        UserError: if the options cannot work.
    """
    check(told_apart(options))
    read_token(options.token_file)  # or it is refused now
    service = make_service(options)
    torch.set_num_threads(1)  # heads are small, and the workers need the cores
    return service


@asynccontextmanager
async def running(
    options: ServeOptions, service: Service | None = None
) -> AsyncIterator[tuple[str, Service]]:
    """Serve while the body runs, then drain and stop; yields the address and the service.

    Args:
        options: what is served, and how.
        service: what `open_service` made of them, if it was called before.

    Raises:
        UserError: if the options cannot work.
    """
    service = service or open_service(options)
    options = told_apart(options)
    shown = app_options(options, service.served)
    memory = BodyMemory(shown.body_memory, service.front.refuse)
    app = build_app(service, shown, memory=memory, starts=False)
    address = (options.host, options.port)
    async with (
        tracing_of(service.front, app, options.traces),
        listening(app, *address, options.deadline_ms, service.front) as url,
        grpc_listening(options, service, shown, memory),
    ):
        await service.front.start()  # now that it answers that it is alive, and not ready
        yield url, service


@asynccontextmanager
async def grpc_listening(
    options: ServeOptions, service: Service, shown: AppOptions, memory: BodyMemory
) -> AsyncIterator[None]:
    """Serve over gRPC as well while the body runs, if that is asked for."""
    if options.grpc_port is None:
        yield
        return
    from codedinvnet.serving.faces.grpc import GrpcFace
    from codedinvnet.serving.service_grpc import ServiceBackend

    face = GrpcFace(
        traced(
            ServiceBackend(service, shown.max_batch, memory.large), service.front.waiting.tracing
        ),
        memory,
        service.front.metrics.requests,
        token=shown.token,
        max_message=shown.max_body,
    )
    async with face.listening(options.host, options.grpc_port, options.deadline_ms / 1000):
        yield


async def _serve(options: ServeOptions, service: Service | None = None) -> None:
    if is_open(options.host, options.token_file):
        tell_open(options.host, options.demo)

    @asynccontextmanager
    async def serving() -> AsyncIterator[tuple[str, FrontEnd]]:
        async with running(options, service) as (address, found):
            yield address, found.front

    def line(address: str, front: FrontEnd) -> str:
        rules, choices = front.rules, front.choices
        size = "" if choices.method is None else f", k = {choices.size}"
        return (
            f"serving {options.source} on {address}: {rules.workers} workers, policy "
            f"{rules.policy.name}{size}"
        )

    await until_told(serving(), line)


def serve(options: ServeOptions) -> None:
    """Serve until SIGTERM or Ctrl-C, then drain and stop."""
    log_to_stderr()
    allow_files()
    try:
        # Before the event loop has the signals: it would see none while the model is loaded.
        service = open_service(options)
    except KeyboardInterrupt:  # told to stop before it was up
        return
    with contextlib.suppress(asyncio.CancelledError):  # likewise
        uvloop.run(_serve(options, service))
